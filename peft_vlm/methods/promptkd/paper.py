"""Where PromptKD comes from."""

from peft_vlm.objective import Paper

PAPER = Paper(
    title="PromptKD: Unsupervised Prompt Distillation for Vision-Language Models",
    year=2024,
    arxiv_id="2403.02781",
    venue="CVPR 2024",
    bibtex="""@inproceedings{li2024promptkd,
  title     = {PromptKD: Unsupervised Prompt Distillation for Vision-Language Models},
  author    = {Li, Zheng and Li, Xiang and Fu, Xinyi and Zhang, Xin and Wang, Weiqiang and Chen, Shuo and Yang, Jian},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}""",
)

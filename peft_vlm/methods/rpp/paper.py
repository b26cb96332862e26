"""Where RPP comes from."""

from peft_vlm.objective import Paper

PAPER = Paper(
    title="Revisiting Prompt Pretraining of Vision-Language Models",
    year=2024,
    arxiv_id="2409.06166",
    venue="arXiv 2024",
    bibtex="""@article{chen2024revisiting,
  title   = {Revisiting Prompt Pretraining of Vision-Language Models},
  author  = {Chen, Zhenyuan and Yang, Lingfeng and Chen, Shuo and Chen, Zhaowei and Liang, Jiajun and Li, Xiang},
  journal = {arXiv preprint arXiv:2409.06166},
  year    = {2024}
}""",
)

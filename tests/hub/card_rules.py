"""The Hub's rules for the metadata of a model card, as far as they can be checked without its lists of models."""

import re
from typing import Any

import yaml

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "other"}
PIPELINES = {"zero-shot-image-classification", "image-classification", "image-text-to-text"}
SDKS = {"gradio", "docker", "static"}
MODEL_ID = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")


def card_problems(content: str, *, kind: str = "model") -> list[str]:
    """Everything the Hub would refuse in a README.md.

    Args:
        content: Text of the file.
        kind: What it is the card of; a Space runs by what stands there.
    """
    match = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    problems = []
    if "license" in data and data["license"] not in LICENSES:
        problems.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append('"license_name" is required with "license: other"')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINES:
        problems.append(f'"pipeline_tag" must be one of {sorted(PIPELINES)}')
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not MODEL_ID.match(base):
            problems.append(f'"base_model" with value "{base}" is not valid. Use a model id.')
    if kind == "space":
        problems += [f'"{name}" is required' for name in ("title", "sdk", "app_file") if not data.get(name)]
        problems += [f'"sdk" must be one of {sorted(SDKS)}'] if data.get("sdk") not in SDKS else []
        problems += [
            f'"models" with value "{m}" is not valid' for m in data.get("models", []) if not MODEL_ID.match(m)
        ]
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be a list of texts')
    return problems + _index_problems(data.get("model-index", []))


def _index_problems(index: Any) -> list[str]:
    problems = []
    for number, entry in enumerate(index):
        if not entry.get("name") or not entry.get("results"):
            problems.append(f'"model-index[{number}]" needs "name" and "results"')
        for place, result in enumerate(entry.get("results", [])):
            where = f"model-index[{number}].results[{place}]"
            if not result.get("task", {}).get("type"):
                problems.append(f'"{where}.task.type" is required')
            for key in ("type", "name"):
                if not result.get("dataset", {}).get(key):
                    problems.append(f'"{where}.dataset.{key}" is required')
            for metric in result.get("metrics", [{}]):
                if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                    problems.append(f'"{where}.metrics" need "type" and a number as "value"')
    return problems

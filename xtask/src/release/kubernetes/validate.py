"""Asks the schemas of Kubernetes' versions, and of the Prometheus operator, what they think of objects.

Standard input: {"versions": ["1.33"], "files": ["a.yaml"]}. Standard output: a list of answers, one for each object and version.
"""
import json
import sys

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus


def unknown(given, known, path):
    """Fields that a model has dropped because it does not know them."""
    if isinstance(given, dict) and isinstance(known, dict):
        for name, value in given.items():
            if name not in known:
                yield f"{path}{name}"
            else:
                yield from unknown(value, known[name], f"{path}{name}.")
    elif isinstance(given, list) and isinstance(known, list):
        for at, (value, other) in enumerate(zip(given, known)):
            yield from unknown(value, other, f"{path}{at}.")


def ask(document, version):
    if document["apiVersion"] == "monitoring.coreos.com/v1":
        model = getattr(prometheus, document["kind"], None)
        if model is None:
            return "no_schema", ""
        try:
            known = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        except ValueError as error:
            return "invalid", str(error)
        fields = list(unknown(document, known, ""))
        return ("invalid", "unknown: " + ", ".join(fields)) if fields else ("valid", "")
    try:
        used = kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return "no_schema", ""
    except kubernetes_validate.ValidationError as error:
        return "invalid", ".".join(str(step) for step in error.path) + ": " + error.message
    # It takes an older version's schemas where it has none of that version.
    return ("valid", "") if used == version else ("no_schema", f"it has none of {version}")


question = json.load(sys.stdin)
answers = []
for name in question["files"]:
    with open(name) as file:
        documents = [document for document in yaml.safe_load_all(file) if document]
    for document in documents:
        for version in question["versions"]:
            outcome, message = ask(document, version)
            namespace = document["metadata"].get("namespace")
            answers.append({
                "file": name,
                "version": version,
                "api": document["apiVersion"],
                "kind": document["kind"],
                "name": "/".join(filter(None, [namespace, document["metadata"]["name"]])),
                "outcome": outcome,
                "message": message,
            })
json.dump(answers, sys.stdout)

"""``helm install`` and ``helm uninstall`` by helm's own code, for a machine without the program."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import helm_python
import yaml


def main(words: list[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(prog="helm")
    verbs = parser.add_subparsers(dest="verb", required=True)
    install, uninstall = verbs.add_parser("install"), verbs.add_parser("uninstall")
    for verb in (install, uninstall):
        verb.add_argument("name")
        verb.add_argument("--namespace", required=True)
    install.add_argument("chart")
    install.add_argument("--create-namespace", action="store_true")
    install.add_argument("--set", action="append", default=[])
    install.add_argument("--values")
    given = parser.parse_args(words)
    with helm_python.Config(namespace=given.namespace, kubeconfig_path=os.environ.get("KUBECONFIG")) as releases:
        if given.verb == "uninstall":
            releases.uninstall(given.name)
            return
        values = yaml.safe_load(Path(given.values).read_text()) if given.values else {}
        for pair in given.set:
            _set(values, *pair.split("=", 1))
        releases.install(given.chart, given.name, values, create_namespace=given.create_namespace)


def _set(values: dict[str, Any], path: str, value: str) -> None:
    *way, last = path.split(".")
    for key in way:
        values = values.setdefault(key, {})
    values[last] = value


if __name__ == "__main__":
    main(sys.argv[1:])

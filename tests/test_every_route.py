"""Every test of loading, once for each route: whoever loads cannot tell which one was taken."""

import json
import os
import subprocess
import sys
from pathlib import Path

from funcmodel.records.routes import ROUTES
from tests.every_route import REPORT

ROOT = Path(__file__).parents[1]
FILES = (
    "tests/test_loading.py",
    "tests/test_assign.py",
    "tests/test_api.py",
    "tests/test_evaluate.py",
    "tests/test_real_weights.py",
    "property_tests/test_evaluate.py",
    "property_tests/test_loading_laws.py",
)


def test_every_test_of_loading_passes_by_every_route(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment = {**os.environ, REPORT: str(report), "HYPOTHESIS_PROFILE": "routes"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.every_route", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'base'}", *FILES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    for route in ROUTES:
        assert found["passed"][route] > 100
        assert found["taken"][route] > 500

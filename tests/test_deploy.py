"""What deploy/ holds for machines without a cluster is what its readers' programs take, and what we take."""

import shutil
import subprocess
import sys
from pathlib import Path

from engines import missing

from app.pools import load_pools

DEPLOY = Path(__file__).parent.parent / "deploy"
NEWER = "Unknown key 'DelegateSubgroup' in section [Service], ignoring."


def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        missing("systemd", "systemd-analyze is not installed")
    unit = (DEPLOY / "systemd" / "runner-launcher.service").read_text()
    assert "\nDelegate=yes\n" in unit
    assert "\nKillMode=process\n" in unit
    copy = tmp_path / "runner-launcher.service"
    copy.write_text(unit.replace("/opt/runner-launcher/bin/runner-launcher", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if str(copy) in line and not line.endswith(NEWER)]
    assert (done.returncode, said) == (0, [])


def test_the_pools_of_compose_load_without_a_warning() -> None:
    pools = load_pools(DEPLOY / "compose" / "pools.yaml")
    assert list(pools.by_name) == ["docker"]
    assert not pools.warnings

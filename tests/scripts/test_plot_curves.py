"""`scripts/plot_curves.py` draws what trainings logged."""

import importlib.util

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("plot_curves", ROOT / "scripts" / "plot_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_curves(main, tmp_path, monkeypatch):
    for name, factor in (("one", 1.0), ("two", 2.0)):
        with SummaryWriter(str(tmp_path / name / "log")) as writer:
            for step in range(5):
                writer.add_scalar("validation/joint", factor / (1 + step), step, walltime=100.0 + 10 * step)
    command = ["plot_curves.py", f"a={tmp_path}/one", f"b={tmp_path}/two", "--output", str(tmp_path / "curves.png")]
    pictures = []
    for over in ("steps", "seconds"):
        monkeypatch.setattr("sys.argv", [*command, "--over", over])
        main()
        pictures.append(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert all({(31, 119, 180), (255, 127, 14)} <= {color for _, color in p.getcolors(10**6)} for p in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()
    monkeypatch.setattr("sys.argv", [*command, "--metric", "loss"])
    with pytest.raises(SystemExit, match=r"one/log has no 'loss'. It has validation/joint"):
        main()
    monkeypatch.setattr("sys.argv", ["plot_curves.py", f"a={tmp_path}/none", "--output", "x.png"])
    with pytest.raises(SystemExit, match=r"none holds no log of a training"):
        main()

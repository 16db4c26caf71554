"""Accelerators as data: what is built in, what a user lays over it, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megallama.errors import UserError
from megallama.hardware import gpus
from megallama.hardware.gpus import Gpu, built_in_hardware, find_gpu, gpu_of_driver, load_hardware

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


@pytest.fixture(autouse=True)
def _no_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "USER_FILE", tmp_path / "own.yaml")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_accelerator_has_what_each_plan_needs_but_the_cpu() -> None:
    for key, gpu in built_in_hardware().items():
        if key != "cpu":
            assert gpu.peak_tflops and gpu.memory_gib and gpu.memory_tb_s, key
            assert gpu.matmul_tflops is None or 0.5 < gpu.matmul_tflops / gpu.peak_tflops < 1, key
    assert built_in_hardware()["cpu"].peak_tflops is None


def test_figures_that_are_in_print() -> None:
    known = built_in_hardware()
    h100, h200, a100 = known["h100-80g"], known["h200"], known["a100-40g"]
    assert (h100.peak_tflops, h100.memory_tb_s, h100.node_link_gb_s, h100.nic_gb_s) == (989.4, 3.35, 450, 50)
    assert (h200.memory_gib, h200.memory_tb_s) == (141, 4.8)
    assert (a100.peak_tflops, a100.memory_tb_s) == (312, 1.56)


def test_one_chip_in_two_forms_shares_its_constants() -> None:
    known = built_in_hardware()
    assert list(known["a100-40g"].efficiency) == list(known["a100-80g"].efficiency) != []
    assert known["a100-40g"].default_efficiency() == known["a100-80g"].default_efficiency()
    assert known["h200"].efficiency == known["h100-80g"].efficiency != {}


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peak_by_the_name_of_the_driver(device: str, peak: float | None) -> None:
    found = gpu_of_driver(device, built_in_hardware())
    assert (None if found is None else found.known("peak_tflops") * 1e12) == peak


def test_a_file_adds_an_accelerator_and_replaces_single_figures(tmp_path: Path) -> None:
    text = "mine: {peak_tflops: 100, memory_tb_s: 1.5, efficiency: {ours: 0.5}}\nh100-80g: {nic_gb_s: 25}\n"
    known = load_hardware(written(tmp_path / "more.yaml", text))
    assert known["mine"].known("peak_tflops") == 100
    assert known["mine"].default_efficiency() == 0.5
    assert (known["h100-80g"].nic_gb_s, known["h100-80g"].peak_tflops) == (25, 989.4)
    assert built_in_hardware()["h100-80g"].nic_gb_s == 50


def test_a_constant_of_the_user_comes_before_those_that_are_built_in(tmp_path: Path) -> None:
    gpu = load_hardware(written(tmp_path / "more.yaml", "a100-80g: {efficiency: {mine: 0.7}}"))["a100-40g"]
    assert gpu.default_efficiency() == 0.7
    assert gpu.efficiency["llama-2"] == built_in_hardware()["a100-80g"].efficiency["llama-2"]


def test_the_file_of_the_user_holds_and_a_file_that_is_named_wins(tmp_path: Path) -> None:
    written(tmp_path / "own.yaml", "h200: {nic_gb_s: 100, power_w: 600}")
    assert load_hardware()["h200"].nic_gb_s == 100
    named = load_hardware(written(tmp_path / "named.yaml", "h200: {nic_gb_s: 12}"))["h200"]
    assert (named.nic_gb_s, named.power_w) == (12, 600)


@pytest.mark.parametrize("name", ["H100-80G", "h100_80g", " h100 80g ", "H100"])
def test_names_are_found_however_they_are_typed(name: str) -> None:
    assert find_gpu(name).key == "h100-80g"


@pytest.mark.parametrize("name", ["My_Card", "my-card", "MY CARD", "Big_One", "big-one"])
def test_names_of_a_file_are_found_however_they_are_written_there(name: str, tmp_path: Path) -> None:
    known = load_hardware(written(tmp_path / "more.yaml", "My_Card: {alias: Big_One, peak_tflops: 100}"))
    assert find_gpu(name, known).key == "My_Card"
    with pytest.raises(UserError, match=r"^the GPU my-c is not known; did you mean My_Card\?$"):
        find_gpu("my-c", known)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("h100-", "the GPU h100- is not known; did you mean h100-pcie, h100-nvl, h100-80g or h100-96g-500w?"),
        ("a100-80gb", "the GPU a100-80gb is not known; did you mean a100-80g"),
        ("b20", "the GPU b20 is not known; did you mean b200?"),
        ("trainium", "the GPU trainium is not known; known: a100-40g, a100-80g"),
        ("", "the GPU  is not known; known: a100-40g"),
    ],
)
def test_an_unknown_name_brings_the_nearest(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        find_gpu(name)


def test_a_driver_keeps_three_per_cent_of_the_memory_where_it_is_known() -> None:
    known = built_in_hardware()
    assert known["h100-80g"].usable_bytes == int(0.97 * 80 * 2**30)
    with pytest.raises(UserError, match=r"^cpu\.memory_gib is not known; give it in "):
        _ = known["cpu"].usable_bytes


def test_a_figure_that_is_not_known_is_asked_for() -> None:
    known = built_in_hardware()
    with pytest.raises(UserError, match=r"^gh200-96g\.nic_gb_s is not known; give it in .* or by --hardware FILE$"):
        known["gh200-96g"].known("nic_gb_s")
    with pytest.raises(UserError, match=r"^b200\.efficiency is not known; assume a speed by --mfu 0\.4"):
        known["b200"].default_efficiency()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", "is not a mapping of GPUs"),
        ("mine: 3", "is not a mapping of GPUs; write each as h100-80g: {peak_tflops: 989.4}"),
        ("mine: {peak: 3}", "unknown key mine.peak; did you mean mine.peak_tflops?"),
        ("mine: {key: other}", "unknown key mine.key; "),
        ("mine: {peak_tflops: -3}", "mine.peak_tflops=-3 is not legal: input should be greater than 0"),
        ("mine: {peak_tflops: fast}", "mine.peak_tflops=fast is not legal: input should be a valid number"),
        ("mine: {memory_tb_s: .inf}", "mine.memory_tb_s=inf is not legal"),
        ("mine: {efficiency: {ours: 1.5}}", "mine.efficiency.ours=1.5 is not legal"),
        ("mine: {efficiency: 0.5}", "mine.efficiency=0.5 is not a mapping; write it as efficiency: {mine: 0.5}"),
        ("mine: {efficiency_of: yours}", "mine.efficiency_of=yours is no GPU that is known"),
        ("mine: {efficiency_of: [a]}", "mine.efficiency_of=['a'] is no GPU that is known"),
        ('mine: {driver_name: "(("}', "mine.driver_name=(( is no regular expression (missing ), unterminated"),
        ('mine: {driver_name: "(?i)card"}', "mine.driver_name=(?i)card is no regular expression (global flags"),
        ('mine: {name: "two\\nlines"}', "the name 'two\\nlines' of a GPU is not legal: it takes more than one line"),
        ('"two\\nlines": {name: mine}', "the name 'two\\nlines' of a GPU is not legal"),
        ("mine: {alias: h100}", "mine is called h100, as h100-80g is; give it another key or alias, or write h100-80g"),
        ("mine: {alias: H200}", "mine is called h200, as h200 is; give it another key or alias"),
        ("H100_80G: {nic_gb_s: 25}", "H100_80G is called h100-80g, as h100-80g is; give it another key or alias"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        load_hardware(written(tmp_path / "more.yaml", text))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_hardware(tmp_path / "none.yaml")


def test_the_example_of_the_page_is_a_legal_file(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(h100-80g:\n.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    known = load_hardware(written(tmp_path / "more.yaml", example))
    assert known["h100-80g"].default_efficiency() == known["h200"].default_efficiency() == 0.55
    assert known["my-card"].known("nic_gb_s") == 50


def test_the_page_has_every_figure_of_an_accelerator() -> None:
    page = PAGE.read_text()
    named = set(Gpu.model_fields) - {"key", "name", "driver_name"}
    assert {name for name in named if f"`{name}`" not in page} == set()


def test_no_two_accelerators_share_a_name() -> None:
    names = [name for gpu in built_in_hardware().values() for name in (gpu.key, gpu.alias) if name]
    assert len(set(names)) == len(names)

"""What is private and what is public, in one table each, for what writes texts and for what looks at them at last."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image, PngImagePlugin

from hf_msn.hub.upload.private_data import PrivateData
from hf_msn.privacy import PrivateWords, find_private, public_name, without_private

SECRET = "0123456789abcdef/0123"
TOKENS = [
    "hf_abcdefgh12345",
    "hf_secret1",
    "hf_" + "aB3" * 11 + "x",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
    "Bearer abcdef0123456789",
    "sk-proj-abcdefgh12345678",
    "https://alice_smith:pa55w0rd@git.example.org/a/b",
    "https://bucket.s3.example.com/x?X-Amz-Signature=0123456789abcdef",
    SECRET,
]
PATHS = [
    "/home/alice_smith",
    "/home/alice_smith/runs/secretproject/birds",
    "/home/alice_smith/my data/birds",
    "/Users/bob/birds",
    "/mnt/secretproject/birds",
    "/root/secretproject/birds",
    "--data=/mnt/secretproject/birds",
    "timm:/home/bob/net",
    "timm:/mnt/bob/net",
    "/mnt/secretproject/a:/mnt/secretproject/b",
    "</mnt/secretproject/birds>",
    "<b>/mnt/secretproject/birds</b>",
    "run >/mnt/secretproject/log",
    "C:\\Users\\alice_smith\\birds",
    "D:/secretproject/birds",
    "see C:\\secretproject\\birds, please",
    "\\\\server\\secretproject\\birds",
    "look at \\\\server\\secretproject",
    "file:///home/alice_smith/birds",
    "file:/mnt/secretproject/birds",
    "s3://secretproject/alice_smith/birds",
    "~/secretproject/birds",
    "~alice_smith/birds",
    "alice_smith/secretproject/birds",
    "alice_smith/birds.tar",
    "data/alice_smith/birds",
    "alice_smith@gpu7",
    "alice_smith@gpu7:/scratch/birds",
    "%2Fhome%2Falice_smith%2Fbirds",
    "/mnt/alice\\_smith/my\\_runs/birds",
    "\\/mnt\\/secretproject\\/birds",
    "http://localhost:8888/lab/secretproject/birds",
    "http://10.0.0.7/secretproject/birds",
]
PUBLIC = [
    "https://huggingface.co/org/encoder/blob/main/README.md",
    "see https://arxiv.org/abs/2204.07141, and https://a.org/~bob/x/y/.",
    "https://openreview.net/forum?id=rJ4km2R5t7",
    "https://a.org/home/bob/x",
    "git+https://github.com/org/hf_msn",
    "hf://datasets/org/birds/train.parquet",
    "ILSVRC/imagenet-1k",
    "org/alice.birds",
    "timm/vit_small_patch16_224.augreg_in1k",
    "hf_transformers",
    "hf_datasets_1",
    "sk-learn-logistic-regression",
    "and/or",
    "images and/or labels",
    "T-shirt/top",
    "a/b",
    "n/a",
    "Ankle boot/shoe, tench/Tinca tinca",
    "1/3",
    "~1/3 of the labels",
    "~5 epochs",
    "2026/11/21",
    "on 11/21/2026 at 12:30",
    "5 images/s, 3 km/h",
    "<p>text</p><br/>",
    "</p>",
    "$\\mathbb{R}^d \\to \\mathcal{O}(n)/m/k$",
    "$f:\\mathbb{R}\\to\\mathbb{R}$",
    "$f:\\alpha\\to\\beta$",
    "\\alpha\\beta\\gamma",
    "a & b \\\\ \\hline c",
    "\\\\alpha\\\\beta",
    ".*\\.(bias|norm)\\..*",
    "encoder\\.layer\\.\\d+\\.attention",
    "(?i:\\bhead\\b)",
    "a:\\s*",
    "**/*.png",
    "train[:10%]",
    "top-1 [%], mean ± std",
    "scripts/evaluate_low_shot.py",
    "@article{assran2022masked,\n  title   = {Masked Siamese Networks},\n  author  = {Assran, Mahmoud and Caron, M.}}",
    "/m/0bt9lr",
    "model-00001-of-00002.safetensors",
    "key: value",
    "file: vits16.pth.tar",
]
WRAPPED = {
    "alone": "{}",
    "sentence": "trained on {} today",
    "quoted": "it says '{}'.",
    "code": "`{}`",
    "link": "[data]({})",
    "argument": "--value={}",
    "row": "|{}|",
    "second line": "first\n{}",
}
LEAKS = ("alice", "bob/", "secretproject/", "secretproject\\", "home", "Users", SECRET, "hf_a", "ghp_", "github_pat")


@pytest.fixture(autouse=True)
def alice(monkeypatch, tmp_path):
    """The user alice_smith, with a secret in the environment and a working folder that says nothing."""
    set_user(monkeypatch, "alice_smith", "/home/alice_smith")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.chdir(tmp_path)


def set_user(monkeypatch, name: str, home: str | None) -> None:
    for variable in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(variable, name)
    monkeypatch.delenv("SUDO_USER", raising=False)
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)


def checks(text: str, folder: Path) -> dict[str, str | None]:
    """What each way of looking says of a text."""
    guard = PrivateData()
    (folder / "x.json").write_text(json.dumps({"list": [{"said": text}], "said": 1}))
    (folder / "x.yaml").write_text(yaml.safe_dump({"said": text}, allow_unicode=True, width=10**6))
    (folder / "x.md").write_text(f"# Card\n\n{text}\n")
    found = {name: guard.find_in_file(folder / name) for name in ("x.json", "x.yaml", "x.md")}
    # JSON text as a value of JSON, and in the middle of Markdown
    (folder / "y.json").write_text(json.dumps({"said": json.dumps({"inner": text})}))
    (folder / "y.md").write_text(f"```json\n{json.dumps({'said': text}, indent=2)}\n```\n")
    found |= {name: guard.find_in_file(folder / name) for name in ("y.json", "y.md")}
    return {"text": find_private(text), **found}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("private", [*TOKENS, *PATHS])
def test_what_is_private_is_found_and_what_was_written_is_not(private, wrapping, tmp_path):
    text = WRAPPED[wrapping].format(private)
    missed = [name for name, found in checks(text, tmp_path).items() if found is None]
    assert missed == []
    written = without_private({"said": text, "list": [text], text: 1})
    assert not any(checks(json.dumps(written), tmp_path).values())
    assert not any(checks(written["said"], tmp_path).values())
    assert [leak for leak in LEAKS if leak in json.dumps(written)] == [], written
    assert without_private(written["said"]) == written["said"] == written["list"][0]
    if private in PATHS:
        clean = PrivateData().clean({"said": text})
        assert not any(checks(clean["said"], tmp_path).values()), clean
        assert PrivateData().clean(clean) == clean


@pytest.mark.parametrize("public", PUBLIC)
def test_what_is_public_stays_as_it_is_and_is_not_found(public, tmp_path):
    assert without_private({"said": public}) == {"said": public}
    assert PrivateData().clean([public]) == [public]
    found = {wrapping: checks(text.format(public), tmp_path) for wrapping, text in WRAPPED.items()}
    assert [(w, name, said) for w, kinds in found.items() for name, said in kinds.items() if said] == []


def test_a_name_is_hidden_in_a_record_and_no_word_of_a_card():
    assert without_private({"notes": "by Alice_Smith", "of": "alice_smith/encoder"}) == {
        "notes": "by (local)",
        "of": "alice_smith/encoder",
    }
    assert find_private("by alice_smith") is None and find_private("datasets:\n- alice_smith/birds") is None
    assert find_private("alice_smith/birds/run") and not find_private("alice_smith/a/b", namespace="alice_smith")


def test_what_lies_here_is_a_path_and_no_hub_id(tmp_path):
    (tmp_path / "alice_smith" / "birds").mkdir(parents=True)
    assert find_private("alice_smith/birds") is not None
    assert without_private(["alice_smith/birds"]) == PrivateData().clean(["alice_smith/birds"]) == ["birds"]


@pytest.mark.parametrize(
    "name", ["main", "test", "max", "adam", "digits", "nvidia", "float32", "1000", "path", "figures"]
)
def test_a_user_who_has_the_name_of_a_common_word_can_publish(name, monkeypatch):
    set_user(monkeypatch, name, f"/home/{name}")
    record = {"max_steps": 5, "optimizer": "adam", "data": {"name": "digits", "split": "test"}, "revision": "main"}
    record |= {"precision": "float32", "device": "NVIDIA H200", "note": "1000 images"}
    assert without_private(record) == record
    assert find_private(published_card()) is None
    assert find_private(f"/home/{name}/birds") is not None


def test_no_name_of_a_user_makes_a_published_card_private(monkeypatch):
    card = published_card().split("```sh")[0]
    for name in set(re.findall(r"[\w-]{3,}(?=[/@\\])", card)):
        set_user(monkeypatch, name, f"/home/{name}")
        assert find_private(card) is None, name


def published_card() -> str:
    card = Path(__file__).parents[1] / "model_cards" / "msn-vit-digits" / "README.md"
    block = "```sh\npython scripts/evaluate_low_shot.py --model runs/mine/checkpoint-10 --dataset ./data/birds\n```"
    return card.read_text() + f"\n{block}\n![accuracy](figures/low_shot.png)\n"


@pytest.mark.parametrize("home", ["/", "/root", "/data", "", ".", None])
def test_a_home_that_is_none_is_no_place(home, monkeypatch):
    set_user(monkeypatch, "root", home)
    assert find_private(published_card()) is None and PrivateWords().users == set()
    assert without_private({"a": "1/3", "b": "/root/data/birds", "c": "and/or"}) == {
        "a": "1/3",
        "b": "birds",
        "c": "and/or",
    }
    assert public_name("~") == public_name("/") == "(local)"


def test_a_user_id_without_a_name_and_a_removed_folder_are_no_error(monkeypatch, tmp_path):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert find_private("/mnt/alice/birds") is not None and find_private("a/b") is None
    assert without_private(["/home/bob/birds", "digits"]) == ["birds", "digits"]


def test_places_of_this_machine_are_found_also_where_they_are_short_or_have_blanks(tmp_path, monkeypatch):
    place = tmp_path / "my work"
    place.mkdir()
    monkeypatch.chdir(place)
    assert find_private(f"-I{place}/include") is not None
    assert PrivateData(folders=[Path("/data/run")]).places.count("/data/run") == 1
    assert find_private("trained in /data") is None and PrivateData().find("it is in /data/run") is not None


def test_a_secret_is_not_repeated_in_what_is_said_of_it():
    for secret in TOKENS:
        said = find_private(f"key {secret}")
        assert "token or password" in said and secret not in said
    assert "/mnt/secretproject" not in find_private("see /mnt/secretproject/birds")


def test_a_key_that_is_there_twice_and_text_behind_the_pixels_are_seen(tmp_path):
    guard = PrivateData()
    (tmp_path / "x.json").write_text('{"a": "/mnt/alice/x", "a": 1}')
    assert guard.find_in_file(tmp_path / "x.json") is not None
    text = PngImagePlugin.PngInfo()
    text.add(b"tEXt", b"Author\0made in /mnt/alice/plots", after_idat=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=text)
    assert "'.../plots'" in guard.find_in_file(tmp_path / "x.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "x.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"'broken.png' is damaged .* Save it anew"):
        guard.find_in_file(tmp_path / "broken.png")

"""The page as a Hugging Face Space: a folder with what its hardware needs, and the way to the Hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from .base.fetching import HUB_FILES
from .base.models import DEFAULT, MODELS
from .errors import PeftlabError, SpecError
from .places import ROOT
from .room import host
from .spec import closest

TORCH = "2.11.0"
"""The newest that ZeroGPU has (its documentation, July 2026). Other hardware gets the same."""
PYTHON = "3.12.12"
"""The newest that ZeroGPU has."""
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
PARTS = ("app.py", "demos", "peftlab", "assets", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "bundle", "lora.png", "layers.svg", ".*")
THUMBNAIL = "assets/screenshot.png"
TAGS = ("peft", "lora", "fine-tuning", "education")


@dataclass(frozen=True)
class Space:
    """A Space to be made."""

    name: str
    """OWNER/NAME."""
    hardware: str
    """One of the Hub's names, such as cpu-basic, zero-a10g or l4x1."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of `room.host`, for everybody to see."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """The same, for nobody to see."""

    def __post_init__(self) -> None:
        """Raises SpecError for a name, a hardware or a setting that cannot be."""
        if not re.fullmatch(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", self.name):
            raise SpecError(f"name={self.name}: not of the form OWNER/NAME; write both, such as ann/peftlab")
        if self.hardware not in (known := kinds()):
            raise SpecError(f"hardware={self.hardware}: the Hub has no such hardware; {closest(self.hardware, known)}")
        given = {**self.variables, **self.secrets}
        for name in given:
            if name not in (known := [variable for variable, *_ in host.table()]):
                raise SpecError(f"{name}: no setting of a host; {closest(name, known)}")
        host.Host.read(given)

    @property
    def url(self) -> str:
        return f"https://huggingface.co/spaces/{self.name}"


def kinds() -> list[str]:
    """The hardware that the Hub has, by the names that it goes by."""
    from huggingface_hub import SpaceHardware

    return [hardware.value for hardware in SpaceHardware]


def write(space: Space, folder: Path) -> None:
    """Writes the Space's files into a new folder. Raises SpecError where there is something already."""
    if folder.exists() and any(folder.iterdir()):
        raise SpecError(f"out={folder}: there is something in it; give another folder, or empty this one")
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        source = Path(__file__).parent if part == "peftlab" else ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=LEFT_OUT)
        elif source.exists():  # an installed package has no licence beside it
            shutil.copyfile(source, folder / part)
    (folder / "requirements.txt").write_text("\n".join(requirements(space)) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(space), encoding="utf-8")


def requirements(space: Space) -> list[str]:
    """What the Space installs: what this package needs, with one version of torch, which without a GPU is the small build."""
    from importlib.metadata import PackageNotFoundError, requires

    checkout = ROOT / "requirements.txt"
    try:
        needed = checkout.read_text(encoding="utf-8").split("\n") if checkout.exists() else requires("peftlab") or []
    except PackageNotFoundError:
        raise PeftlabError("peftlab is neither a checkout nor installed here; pip install it") from None
    others = [one for one in needed if one and "extra ==" not in one and not re.match(r"torch\b", one)]
    if space.hardware.startswith("cpu"):
        return [f"--extra-index-url {CPU_BUILDS}", f"torch=={TORCH}+cpu", *others]
    return [f"torch=={TORCH}", *others]


def readme(space: Space) -> str:
    """The Space's page on the Hub, whose head tells the Hub how to run it."""
    entry = MODELS[DEFAULT]
    files = ",".join(f"*{end}" for end in HUB_FILES)
    head = [
        "---",
        "title: peftlab",
        "emoji: 🧩",
        "colorFrom: blue",
        "colorTo: yellow",
        "sdk: gradio",
        f"sdk_version: {version('gradio')}",
        f'python_version: "{PYTHON}"',
        "app_file: app.py",
        f"suggested_hardware: {space.hardware}",
        "license: apache-2.0",
        "short_description: See, touch and check fine-tuning of few parameters",
        f"thumbnail: {space.url}/resolve/main/{THUMBNAIL}",
        "tags:",
        *(f"  - {tag}" for tag in TAGS),
        "models:",
        f"  - {entry.hub_id}",
        "preload_from_hub:",
        f"  - {entry.hub_id} {files}",
        "---",
    ]
    settings = [f"- `{name}={value}`" for name, value in space.variables.items()]
    settings += [f"- `{name}`, a secret" for name in space.secrets]
    text = [
        "# peftlab",
        "",
        "Fine-tune a fraction of a model, and check every number: what it costs, why it trains so little, a real fine-tune in",
        "front of you, base and adapted model side by side.",
        *(["", "Set by this Space's host:", "", *settings] if settings else []),
    ]
    return "\n".join([*head, "", *text, ""])


def upload(space: Space, folder: Path, private: bool = False) -> None:
    """Makes the Space, or sets the hardware and the settings of one that is there, and uploads the folder.

    What was set before and is not named now stays. Raises PeftlabError where the Hub refuses.
    """
    from huggingface_hub import HfApi, SpaceHardware, errors

    api = HfApi()
    try:
        if api.repo_exists(space.name, repo_type="space"):
            for name, value in space.variables.items():
                api.add_space_variable(space.name, name, value)
            for name, value in space.secrets.items():
                api.add_space_secret(space.name, name, value)
            if api.get_space_runtime(space.name).requested_hardware != space.hardware:
                api.request_space_hardware(space.name, SpaceHardware(space.hardware))
        else:
            api.create_repo(
                space.name, repo_type="space", space_sdk="gradio", space_hardware=SpaceHardware(space.hardware),
                private=private, space_secrets=_pairs(space.secrets), space_variables=_pairs(space.variables),
            )  # fmt: skip
        api.upload_folder(repo_id=space.name, repo_type="space", folder_path=folder, commit_message="peftlab deploy")
    except errors.LocalTokenNotFoundError:
        raise PeftlabError("nobody is logged in here: run hf auth login, with a token that may write") from None
    except Exception as error:
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise PeftlabError(
            f"the Hub refused {space.name} ({said}); log in with hf auth login and a token that may write there"
        ) from None


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": name, "value": value} for name, value in values.items()]

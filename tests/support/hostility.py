"""The attacks that `python -m tests.hostile` runs, by what they are after."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CANARY = Path(tempfile.gettempdir()) / f"ckptconv-canary-{os.getpid()}"
"""A file that exists if code of an input ran, or the network was asked."""
EVIL = f"open({str(CANARY)!r}, 'w').write('code ran')\n"


@dataclass
class Scene:
    """A user's folder, with `model.safetensors` and the folder `model` that was made of it."""

    root: Path
    made_meanwhile: list[str] = field(default_factory=list)

    def names(self) -> dict[str, str]:
        """Returns what a command can name."""
        return {"root": str(self.root)}

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file of the user."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def write_meanwhile(self, name: str) -> None:
        """Writes a file of the user while a command runs."""
        self.write(name, "of the user")
        self.made_meanwhile.append(name)

    def edit(self, name: str, **entries: Any) -> None:
        """Changes entries of a JSON file."""
        path = self.root / name
        self.write(name, json.dumps(json.loads(path.read_text()) | entries))

    def special(self, name: str, kind: str) -> None:
        """Puts something in the place of a file that hangs or swells."""
        path = self.root / name
        path.unlink(missing_ok=True)
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "an endless device":
            path.symlink_to("/dev/zero")
        else:
            path.touch()
            os.truncate(path, 118_000_000 if kind == "118 MB of zeros" else 0)


Act = Callable[[Scene], object]
"""What changes something in a user's folder."""


@dataclass(frozen=True)
class Attack:
    """An attack on one command.

    Attributes:
        name: what it does.
        command: arguments of `ckptconv`, run in the user's folder.
        expect: `taken`, `refused`, `either` or `stopped`.
        prepare: changes the user's files first.
        during: acts while the command writes.
        killed: the command is killed, and run again.
        replaces: names below the user's folder that the command may change.
        stdout: where the output goes instead.
        loads: whether models are loaded, which takes seconds.
    """

    name: str
    command: str
    expect: str = "refused"
    prepare: Act = lambda _: None
    during: Act | None = None
    killed: bool = False
    replaces: tuple[str, ...] = ()
    stdout: Path | None = None
    loads: bool = False


CONVERT = "convert model.safetensors out"
EXPORT = "export model back.safetensors"
GENERATE = "generate model cat -o out.png --steps 1 --size 64 --device cpu"
GENERATE_FILE = "generate model.safetensors cat -o out.png --steps 1 --size 64 --device cpu"
VERIFY = "verify model.safetensors model"
VERIFY_ALONE = "verify model"
DONOR = "convert model.safetensors out --vae model/vae --text-encoder model/text_encoder"


def written(name: str, content: str | bytes = "mine") -> Act:
    """Returns what writes a file of the user."""
    return lambda scene: scene.write(name, content)


def edited(name: str, **entries: object) -> Act:
    """Returns what changes entries of a JSON file."""
    return lambda scene: scene.edit(name, **entries)


def made(name: str, kind: str) -> Act:
    """Returns what puts something in the place of a file that hangs or swells."""
    return lambda scene: scene.special(name, kind)


def linked(name: str, target: str) -> Act:
    """Returns what makes a link."""
    return lambda scene: (scene.root / name).symlink_to(target)


def gone(name: str) -> Act:
    """Returns what takes a component or file out of the folder."""
    return lambda scene: (scene.root / name).rename(scene.root / "away")


def both(*acts: Act) -> Act:
    """Returns what does one thing after the other."""
    return lambda scene: [act(scene) for act in acts]


def appears(name: str) -> Act:
    """Returns what makes a file of the user while a command runs."""
    return lambda scene: scene.write_meanwhile(name)


def raises(number: signal.Signals, times: int = 1) -> Act:
    """Returns what sends a signal to the command."""

    def act(_: Scene) -> None:
        for _time in range(times):
            os.kill(os.getpid(), number)

    return act


def strangers(scene: Scene) -> None:
    """Puts a user's own files into a converted folder."""
    scene.write("model/notes.txt", "mine")
    scene.write("model/samples/1.png", "mine")
    scene.write("model/lora/my.safetensors", "mine")


def in_place(name: str) -> Act:
    """Returns what writes over a file in place."""

    def act(scene: Scene) -> None:
        with (scene.root / name).open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(range(64)))
            os.utime(file.fileno(), ns=(10**18, 10**18))
        scene.made_meanwhile.append(name)

    return act


RACES = [
    Attack("a folder appears at OUT of convert", CONVERT, during=appears("out/mine.txt")),
    Attack("a file appears at OUT of convert", CONVERT, during=appears("out")),
    Attack("an empty folder appears", CONVERT, during=lambda s: (s.root / "out").mkdir()),
    Attack("a file appears at OUT of export", EXPORT, during=appears("back.safetensors")),
    Attack("a stranger appears at OUT, --overwrite", f"{CONVERT} --overwrite",
           during=appears("out/mine.txt")),
    Attack("a link appears at OUT", CONVERT,
           during=linked("out", "model")),
]  # fmt: skip
REPORTS = [
    Attack(f"{option} onto {what}", f"{VERIFY} {option} {name}",
           prepare=both(written("notes.txt"), written("image.png", b"\x89PNG\r\n\0")))
    for option in ("--junit", "--html", "--markdown")
    for what, name in {
        "the checkpoint": "model.safetensors",
        "a weight file of the folder": "model/vae/diffusion_pytorch_model.safetensors",
        "a configuration": "model/unet/config.json",
        "a folder": "model/unet",
        "a file of another kind": "image.png",
    }.items()
] + [
    Attack("--junit through a link to a file", f"{VERIFY} --junit link.xml",
           prepare=both(written("notes.txt"), linked("link.xml", "notes.txt"))),
    Attack("--junit onto a text file", f"{VERIFY} --junit notes.txt",
           prepare=written("notes.txt")),
    Attack("a page onto a text file", "inspect model.safetensors --html notes.txt --overwrite",
           prepare=written("notes.txt")),
]  # fmt: skip
OVERWRITING = [
    Attack("strangers in a converted folder", "convert model.safetensors model --overwrite",
           "either", strangers, replaces=("model/unet", "model/vae", "model/t", "model/ckptconv",
                                          "model/s", "model/model_index.json")),
    Attack("a folder that only has a record", "convert model.safetensors mine --overwrite",
           prepare=both(written("mine/ckptconv/source.json", "{}"), written("mine/thesis.txt"))),
    Attack("a folder of somebody else", "convert model.safetensors mine --overwrite",
           prepare=written("mine/thesis.txt")),
    Attack("the folder that is read", "export model model/unet/config.json --overwrite"),
    Attack("a new file in the folder that is read", "export model model/back.safetensors"),
    Attack("the input", "export model model/vae/diffusion_pytorch_model.safetensors --overwrite"),
    *(Attack(f"OUT is {place}", f"convert model.safetensors {place} --overwrite")
      for place in (".", "..", "model/..", "{root}", "model.safetensors")),
]  # fmt: skip
STOPPED = [
    Attack(f"{number.name} at {command.split()[0]}", command, "stopped", during=raises(number, n))
    for command in (CONVERT, EXPORT)
    for number, n in ((signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGQUIT, 1),
                      (signal.SIGINT, 1), (signal.SIGINT, 2))
] + [
    Attack(f"killed, then run again: {command}", command, "taken", killed=True,
           during=raises(signal.SIGKILL), replaces=("model/", "out", "back"))
    for command in (CONVERT, EXPORT, "convert model.safetensors model --overwrite")
]  # fmt: skip
CHANGED = [
    Attack("the source changes while convert reads", CONVERT, during=in_place("model.safetensors")),
    Attack("the folder changes while export reads", EXPORT,
           during=in_place("model/unet/diffusion_pytorch_model.safetensors")),
]  # fmt: skip

CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "attention from a kernel hub": (
        "text_encoder/config.json", {"attn_implementation": "someone/kernel"}),
    "private attention entry": (
        "text_encoder/config.json", {"_attn_implementation": "someone/kernel"}),
    "auto_map of a text encoder": (
        "text_encoder/config.json", {"auto_map": {"AutoModel": "someone/repo--evil.Evil"}}),
    "quantization of a UNet": (
        "unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    "quantization of a text encoder": (
        "text_encoder/config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "auto_map of a tokenizer": (
        "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    "tokenizer of another class": (
        "tokenizer/tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
    "a UNet of another class": ("unet/config.json", {"_class_name": "EvilModel"}),
    "a pipeline of one's own": ("model_index.json", {"_class_name": "evil"}),
    "a pipeline from a pair": ("model_index.json", {"_class_name": ["evil", "Evil"]}),
    "a component of one's own": ("model_index.json", {"unet": ["evil", "Evil"]}),
    "a component in a module": ("model_index.json", {"unet": ["os", "system"]}),
    "a component of dynamic modules": (
        "model_index.json", {"vae": ["diffusers_modules.local.evil", "Evil"]}),
    "a component above": ("model_index.json", {"unet": ["../unet/evil", "Evil"]}),
    "a component too many": ("model_index.json", {"extra": ["evil", "Evil"]}),
}  # fmt: skip


def asks_for_code(name: str, entries: dict[str, Any]) -> Act:
    """Returns what edits a configuration, and puts Python beside it that must not run."""

    def prepare(scene: Scene) -> None:
        scene.edit(f"model/{name}", **entries)
        for place in (
            "unet/evil.py",
            "evil.py",
            "evil/__init__.py",
            "extra/evil.py",
            "pipeline.py",
        ):
            scene.write(f"model/{place}", EVIL)

    return prepare


LET_IN = [
    Attack(f"{what}: {command.split()[0]}", command, "either", asks_for_code(*change),
           loads=command is GENERATE)
    for what, change in CODE.items()
    for command in (GENERATE, VERIFY_ALONE, EXPORT, DONOR)
]  # fmt: skip

SMALL_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "ckptconv/source.json",
    "ckptconv/layout.json",
    "unet/diffusion_pytorch_model.safetensors",
)
SWELL = [
    Attack(f"{kind} as {name}: {command.split()[0]}", command, "either",
           made(f"model/{name}", kind),
           loads=command is GENERATE)
    for name in SMALL_FILES
    for kind in ("a pipe", "an endless device", "118 MB of zeros", "nothing")
    for command in (GENERATE, VERIFY_ALONE, EXPORT, DONOR)
] + [
    Attack(f"{kind} as {option}", f"{CONVERT} {option} it.yaml",
           prepare=made("it.yaml", kind))
    for kind in ("a pipe", "an endless device", "118 MB of zeros")
    for option in ("--original-config", "--vae", "--lora")
] + [
    Attack(f"{entry} = {value!r:.20} in {name}: {command.split()[0]}", command, "either",
           edited(f"model/{name}", **{entry: value}),
           loads=command is GENERATE)
    for name, entry, value in (
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
        ("text_encoder/config.json", "vocab_size", 10**12),
        ("text_encoder/config.json", "hidden_size", -1),
        ("unet/config.json", "block_out_channels", [10**9] * 4),
        ("unet/config.json", "layers_per_block", 10**7),
        ("unet/config.json", "norm_num_groups", 0),
        ("unet/config.json", "block_out_channels", []),
        ("vae/config.json", "block_out_channels", None),
        ("vae/config.json", "latent_channels", "4"),
        ("vae/config.json", "scaling_factor", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
        ("scheduler/scheduler_config.json", "beta_schedule", "odd"),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "_class_name", "UNet2DConditionModel"),
        ("vae/config.json", "_class_name", "UNet2DConditionModel"),
        ("model_index.json", "vae", []),
        ("model_index.json", "unet", {}),
        ("model_index.json", "scheduler", [1, 2]),
        ("model_index.json", "tokenizer", [None, None]),
        ("model_index.json", "_class_name", "FluxPipeline"),
        ("tokenizer/tokenizer_config.json", "model_max_length", -5),
    )
    for command in (GENERATE, VERIFY_ALONE, EXPORT)
]  # fmt: skip


UNET = "model/unet/diffusion_pytorch_model.safetensors"
RUNS = b"\x80\x04cos\nsystem\n(S'touch " + bytes(CANARY) + b"'\ntR."
"""A pickle that makes the canary where it is loaded."""
DAMAGED = [
    Attack(f"{what}: {command.split()[0]}", command, "either", prepare, loads=command is GENERATE)
    for what, prepare in {
        "no tokenizer": gone("model/tokenizer"),
        "no vocabulary": gone("model/tokenizer/vocab.json"),
        "no scheduler": gone("model/scheduler"),
        "no index": gone("model/model_index.json"),
        "no weights": gone("model/unet/diffusion_pytorch_model.safetensors"),
        "junk vocabulary": written("model/tokenizer/vocab.json", '{"a": "b"}'),
        "vocabulary of a list": written("model/tokenizer/vocab.json", "[1]"),
        "junk merges": written("model/tokenizer/merges.txt", b"\xff\xfe\0 a b c\n"),
        "index of a list": written("model/model_index.json", "[]"),
        "configuration of a list": written("model/unet/config.json", "[]"),
        "configuration of deep lists": written("model/unet/config.json", "[" * 10**5),
        "a VAE that is a UNet": both(gone("model/vae"), linked("model/vae", "unet")),
        "pickled weights": both(gone(UNET), written(UNET.replace("safetensors", "bin"), RUNS)),
        "shards elsewhere": both(gone(UNET), written(f"{UNET}.index.json", json.dumps(
            {"weight_map": {"conv_in.weight": "../../model.safetensors"}}))),
    }.items()
    for command in (GENERATE, VERIFY, VERIFY_ALONE, EXPORT, DONOR)
] + [
    Attack(f"a full device as stdout: {command.split()[0]}", command, "refused",
           stdout=Path("/dev/full"))
    for command in ("inspect model.safetensors", "plan model.safetensors --json", VERIFY,
                    "architectures", "maps check")
]  # fmt: skip

SD1 = "extends: sd1/arch\n"
MAPS = [
    Attack(f"{what}: {command.split()[2]}", command, "either",
           written("maps/own/arch.yaml", text),
           loads=False)
    for what, text in {
        "the environment": SD1 + "components: {vae: {config: {sample_size: '${oc.env:HOME}'}}}\n",
        "a file outside": "extends: ../../../../etc/passwd\n",
        "an absolute file": "extends: /etc/passwd\n",
        "Python": "detect: !!python/object/apply:os.system [id]\n",
        "aliases without end": "a: &a [*a]\n",
        "a date": SD1 + "title: 2001-01-01\n",
        "a set": SD1 + "tasks: !!set {a, b}\n",
        "a number as everything": "detect: 1\ntasks: 2\ncomponents: 3\n",
    }.items()
    for command in ("--key-maps maps inspect model.safetensors", "--key-maps maps maps check")
] + [
    Attack(f"{kind} as arch.yaml", "--key-maps maps inspect model.safetensors", "either",
           both(written("maps/own/x.yaml", "a: 1"), made("maps/own/arch.yaml", kind)))
    for kind in ("a pipe", "an endless device", "118 MB of zeros")
]  # fmt: skip

ATTACKS: dict[str, list[Attack]] = {
    "what appears at OUT meanwhile": RACES,
    "reports onto files": REPORTS,
    "--overwrite": OVERWRITING,
    "stopped and killed": STOPPED,
    "inputs that change while they are read": CHANGED,
    "folders that ask for code": LET_IN,
    "key maps": MAPS,
    "files that hang or swell, numbers that do": SWELL,
    "damaged folders": DAMAGED,
}

"""Load a causal language model, attach a fresh LoRA adapter or load a trained one, and say which
model it was.

Weights come from safetensors only; a model's own code runs only when asked for, and then from a
pinned commit. Adapters are loaded strictly: peft alone goes on with freshly initialised weights
where a key is missing, and the gradients of such a model look plausible.

Adapters are always attached under the adapter name "default", so that the parameter names of a
warm-up's moments and of a loaded adapter agree whatever the trainer called it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from gradsift.compute import machine
from gradsift.compute.progress import quiet
from gradsift.config import AUTO, ModelSettings
from gradsift.errors import ConfigError, DataError, IntegrityError, UnknownName, UserError
from gradsift.model.layers import REPACKS, some
from gradsift.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_file, adapter_json
from gradsift.types import counted

TINY = "tiny"  # the name of the built-in model
FOUR_BIT = "nf4"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    FOUR_BIT: torch.bfloat16,
}
# As safetensors names the types that "auto" may choose.
_STORED = {"BF16": "bfloat16", "F16": "float16"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


# ---- where a model is ----


def locate(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str, str | None]:
    """`name` as (folder or hub id, revision). A folder has no revision; a hub id gets the commit
    that `revision` stands for now.

    Raises UserError for a name that is nowhere, ConfigError for remote code from a revision that
    can move.
    """
    if name == TINY:
        from gradsift.model import tiny

        return str(tiny.tiny_model()), None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                "no config.json in this folder",
                where=folder,
                remedy="Give the folder of config.json and *.safetensors.",
            )
        return str(folder), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise UserError(
            "no such model folder",
            where=name,
            remedy="Give a folder with config.json and *.safetensors, a hub name, or tiny.",
        )
    if trust_remote_code and not (revision and _COMMIT.fullmatch(revision)):
        raise ConfigError(
            f"trust_remote_code runs code from {name}; revision {revision or 'main'!r} can change"
            " under you",
            remedy=(
                "Pin it with --revision COMMIT (the 40 hexadecimal digits of a commit you have"
                " read)."
            ),
        )
    try:
        config = cached_file(name, "config.json", revision=revision or "main")
        return name, extract_commit_hash(config, None) or revision
    except (OSError, ValueError, RecursionError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    if Path(name).expanduser().is_dir() or name == TINY:
        return UserError(
            f"cannot load what is in this folder ({' '.join(str(error).split())[:300]})",
            where=name,
            remedy=(
                "Copy or save the model again with its tokenizer"
                " (`tokenizer.save_pretrained(FOLDER)`), or upgrade transformers for a newer kind"
                " of model."
            ),
        )
    return UserError(
        f"cannot get this model or tokenizer ({' '.join(str(error).split())[:200]})",
        where=name,
        remedy=(
            "Check the name (hub names are OWNER/NAME) and, for a gated model, `hf auth login`."
            f" Without a network: run `hf download {name} --local-dir FOLDER` where there is one,"
            f" copy FOLDER here and pass its path. Built in: {TINY}."
        ),
    )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, a local folder or a built-in model. Raises UserError where there
    is none.
    """
    path, revision = locate(name, revision, trust_remote_code)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                path, revision=revision or "main", trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(name, error) from error
    except ImportError as error:
        raise _lacking(name, error) from error


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    spread: bool = False,
) -> PreTrainedModel:
    """The causal language model of a hub name, a local folder or a built-in name, in eval mode on
    `device`.

    device, dtype: "auto" as in ModelSettings. spread: over all GPUs that the process sees
    (accelerate's device map), wherever `device` is. dtype: float32, bfloat16, float16, or nf4:
    linear layers but the head in 4 bits by bitsandbytes (QLoRA, arXiv 2305.14314), the rest and all
    products in bfloat16. attention: transformers' attn_implementation ("eager", "sdpa", ...); None
    = its default. Raises UserError for a name that is nowhere or holds only pickled weights,
    DataError when the files lack weights that the model needs, ConfigError for an unknown dtype or
    device, for a model whose quantisation or dtype needs a library that is not installed, or for
    remote code without a pinned commit.
    """
    if AUTO in (dtype, str(device)):
        wanted = ModelSettings(
            name=name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=cast(Any, dtype),
            device=str(device),
        )
        decided = in_force(wanted)
        dtype, device = decided.dtype, decided.device
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if dtype == FOUR_BIT and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "dtype nf4 needs bitsandbytes, which is not installed",
            remedy="pip install 'gradsift[four-bit]'",
        )
    path, revision = locate(name, revision, trust_remote_code)
    if revision is None:
        _refuse_pickles(Path(path))
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if spread:
        extra["device_map"] = "auto"
    if dtype == FOUR_BIT:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
        )
        extra.setdefault("device_map", {"": torch.device(device)})
    try:
        with quiet():
            # A resolved commit, not "main": for "main" transformers may fetch weights from a
            # conversion bot's pull request.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=DTYPES[dtype],
                output_loading_info=True,
                **extra,
            )
            model, info = loaded
    except SafetensorError as error:
        raise IntegrityError(
            f"the weights cannot be read ({error})",
            where=name,
            remedy="Download or copy the model again.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(name, error) from error
    except (ImportError, RuntimeError) as error:
        if (method := _quantised_by(path, revision)) is None:
            if isinstance(error, ImportError):
                raise _lacking(name, error) from error
            raise
        raise ConfigError(
            f"its weights are quantised ({method}), and what loads them is not here"
            f" ({' '.join(str(error).split())[:200]})",
            where=name,
            remedy=(
                "Install the library that this names, use a machine that has the device for it, or"
                " give the model's unquantised weights (--dtype nf4 makes 4 bits of those)."
            ),
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise DataError(
            f"{counted(len(missing), 'weight of the model is', 'weights of the model are')} not in"
            " its files and would be random:"
            f" {some(missing)}",
            where=name,
            remedy=(
                "Give a complete causal language model (for an adapter, give its base model here)."
            ),
        )
    if not spread and not getattr(model, "is_quantized", False):
        model = model.to(device)
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    return model.eval()


def in_force(settings: ModelSettings, *, elsewhere: bool = False) -> ModelSettings:
    """`settings` with device and number format decided where they say "auto".

    Args:
        settings: Those of a run.
        elsewhere: The model runs on other machines: whether its device exists is not asked here.

    Returns:
        The same record, or one without "auto".

    Raises:
        ConfigError: This machine has no such device.
        UserError: As `locate`.
    """
    device = settings.device
    if device == AUTO:
        device = machine.best_device()
    elif not elsewhere:
        _require_device(device)
    dtype = settings.dtype
    if dtype == AUTO:
        dtype = "float32"
        if device != "cpu":
            stored = _stored_type(settings)
            dtype = stored if machine.has_type(device, stored) else dtype
    if (device, dtype) == (settings.device, settings.dtype):
        return settings
    return settings.model_copy(update={"device": device, "dtype": dtype})


def _require_device(device: str) -> None:
    try:
        found = torch.device(device)
        present = machine.has_device(found.type) and (
            found.type != "cuda" or (found.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:
        raise ConfigError(
            f"no such device: {device!r}",
            remedy="Give auto, cpu, cuda, cuda:1, mps or xpu.",
        ) from None
    if not present:
        raise ConfigError(
            f"the device {device!r} is not on this machine, or not for this build of torch"
            f" ({torch.__version__})",
            remedy=f"Take --device {machine.best_device()}, or install a build of torch for it.",
        )


def _configs(path: str, revision: str | None) -> list[dict[str, Any]]:
    """config.json as it is, and its part about the language model where there is one; nothing for a
    file that cannot be read: what is wrong with it is told when the model is loaded.
    """
    folder = Path(path)
    try:
        file = (
            folder / "config.json"
            if folder.is_dir()
            else Path(str(cached_file(path, "config.json", revision=revision or "main")))
        )
        whole: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    parts = (whole, whole.get("text_config")) if isinstance(whole, dict) else ()
    return [part for part in parts if isinstance(part, dict)]


def vocabulary(settings: ModelSettings) -> int | None:
    """How many tokens the model embeds, by its config.json; None where that does not say."""
    path, revision = locate(settings.name, settings.revision, settings.trust_remote_code)
    sizes = [
        size
        for part in _configs(path, revision)
        for key in ("vocab_size", "padded_vocab_size")
        if isinstance(size := part.get(key), int)
    ]
    return max(sizes, default=None)


def _quantised_by(path: str, revision: str | None) -> str | None:
    """The kind of quantisation that a checkpoint's config.json names."""
    for part in _configs(path, revision):
        if isinstance(found := part.get("quantization_config"), dict):
            return str(found.get("quant_method", "unknown"))
    return None


def _stored_type(settings: ModelSettings) -> str:
    """The number format of a checkpoint, by config.json or, where that says nothing, by the first
    weights in a folder; "float32" where neither tells.
    """
    path, revision = locate(settings.name, settings.revision, settings.trust_remote_code)
    folder = Path(path)
    for part in _configs(path, revision):
        if named := part.get("dtype") or part.get("torch_dtype"):
            return str(named).rpartition(".")[2]
    for weights in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(weights, "pt") as opened:
                kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except SafetensorError:
            continue
        return next((_STORED[kind] for kind in _STORED if kind in kinds), "float32")
    return "float32"


def from_settings(
    settings: ModelSettings,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    spread: bool = False,
) -> PreTrainedModel:
    """The model that `settings` name, as `load_model` gives it.

    Args:
        settings: Name, revision, number format, device, attention.
        device: A device in place of the settings' own.
        dtype: A number format in place of the settings' own.
        spread: As `load_model`.

    Returns:
        The model in eval mode on the device.

    Raises:
        UserError, DataError, ConfigError, IntegrityError: As `load_model`.
    """
    return load_model(
        settings.name,
        dtype=settings.dtype if dtype is None else dtype,
        device=settings.device if device is None else device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        attention=settings.attention,
        spread=spread,
    )


def tokenizer_from_settings(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `settings` name. Raises UserError where there is none."""
    return load_tokenizer(
        settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )


def _lacking(name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"needs a library that is not installed ({' '.join(str(error).split())[:300]})",
        where=name,
        remedy="Install it, or take another --attention where that is what needs it.",
    )


def _refusal(name: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            "this model brings its own code, which is not run unless asked for",
            where=name,
            remedy="After reading that code: --trust-remote-code --revision COMMIT.",
        )
    return _unreachable(name, error)


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(
        p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}
    )
    if pickled:
        raise UserError(
            f"only pickled weights ({some(pickled)}), which can run code when loaded",
            where=folder,
            remedy=(
                "Where you trust them:"
                " AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes"
                " safetensors."
            ),
        )
    raise UserError(
        "no *.safetensors weights in this folder",
        where=folder,
        remedy="Give the folder that holds them.",
    )


# ---- identity ----


def quantiser(dtype: str) -> dict[str, str]:
    """What the numbers of a model in 4 bits depend on besides the model and torch."""
    return {"bitsandbytes": version("bitsandbytes")} if dtype == FOUR_BIT else {}


def model_identity(name: str, revision: str | None = None) -> dict[str, str]:
    """What a recipe digest says of a model or adapter: never a path, the same on every machine.

    A folder (or built-in model): {"kind", "digest"}, the xxh3-128 over the names and bytes of
    config.json and *.safetensors in name order. An adapter folder: the same, its config taken
    without the path of the base model and without library versions. A hub name: {"kind": "hub",
    "name", "revision": commit}. Raises as `load_model` does.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and (folder / ADAPTER_CONFIG).is_file():
        config = {
            k: v
            for k, v in adapter_json(folder).items()
            if k not in ("base_model_name_or_path", "peft_version")
        }
        for key, value in config.items():
            # peft keeps these names in sets, whose order changes from process to process
            if isinstance(value, list):
                config[key] = sorted(value, key=str)
        total = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
        return {"kind": "adapter", "digest": _fold(total, [adapter_file(folder)])}
    path, commit = locate(name, revision, False)
    if commit is not None:
        return {"kind": "hub", "name": name, "revision": commit}
    weights = [
        p for p in Path(path).iterdir() if p.suffix == ".safetensors" and p.name != ADAPTER_WEIGHTS
    ]
    if not weights:
        _refuse_pickles(Path(path))
    return {
        "kind": "folder",
        "digest": _fold(xxhash.xxh3_128(), [Path(path) / "config.json", *sorted(weights)]),
    }


def _fold(total: xxhash.xxh3_128, files: Sequence[Path]) -> str:
    for path in files:
        one = xxhash.xxh3_128()
        with path.open("rb") as stream:
            while block := stream.read(1 << 23):
                one.update(block)
        total.update(f"{path.name}\0{one.hexdigest()}\n".encode())
    return total.hexdigest()


# ---- LoRA ----

"""Load a causal language model, attach a fresh LoRA adapter or load a trained one, and say which model it was.

Weights come from safetensors only; a model's own code runs only when asked for, and then from a pinned commit. Adapters are loaded
strictly: peft alone goes on with freshly initialised weights where a key is missing, and the gradients of such a model look plausible.

Adapters are always attached under the adapter name "default", so that the parameter names of a warm-up's moments and of a loaded adapter
agree whatever the trainer called it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from gradsift.config import LoraSettings
from gradsift.errors import ConfigError, DataError, IntegrityError, MismatchError, UnknownName, UserError
from gradsift.model.layers import REPACKS, Coverage, block_linears, coverage, lora_targets, some, tracked_modules
from gradsift.store.artifact import read_tensors

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BUILTIN",
    "Coverage",
    "LoraSettings",
    "adapter_state",
    "attach_lora",
    "coverage",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "locate",
    "model_identity",
    "quantiser",
    "quiet",
    "read_adapter_config",
    "remove_lora",
    "tracked_modules",
]

BUILTIN: dict[str, Callable[[], Path]] = {}
"""Built-in models by name: a function that returns the folder, made on first use. The room that makes the model registers it here."""

FOUR_BIT = "nf4"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FOUR_BIT: torch.bfloat16}
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")


# ---- where a model is ----


def locate(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str, str | None]:
    """`name` as (folder or hub id, revision). A folder has no revision; a hub id gets the commit that `revision` stands for now.

    Raises UserError for a name that is nowhere, ConfigError for remote code from a revision that can move.
    """
    if name in BUILTIN:
        return str(BUILTIN[name]()), None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError("no config.json in this folder", where=folder, remedy="Give the folder of config.json and *.safetensors.")
        return str(folder), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise UserError("no such model folder", where=name, remedy="Give a folder with config.json and *.safetensors, a hub name, or tiny.")
    if trust_remote_code and not (revision and _COMMIT.fullmatch(revision)):
        raise ConfigError(
            f"trust_remote_code runs code from {name}; revision {revision or 'main'!r} can change under you",
            remedy="Pin it with --revision COMMIT (the 40 hexadecimal digits of a commit you have read).",
        )
    try:
        config = cached_file(name, "config.json", revision=revision or "main")
        return name, extract_commit_hash(config, None) or revision
    except (OSError, ValueError, RecursionError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    known = f" Built in: {', '.join(sorted(BUILTIN))}." if BUILTIN else ""
    return UserError(
        f"cannot get this model or tokenizer ({' '.join(str(error).split())[:200]})",
        where=name,
        remedy="Check the name (hub names are OWNER/NAME) and, for a gated model, `hf auth login`. Without a network: run "
        f"`hf download {name} --local-dir FOLDER` where there is one, copy FOLDER here and pass its path.{known}",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports from transformers, whose settings are left as they were."""
    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, a local folder or a built-in model. Raises UserError where there is none."""
    path, revision = locate(name, revision, trust_remote_code)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(name, error) from error


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal language model of a hub name, a local folder or a built-in name, in eval mode on `device`.

    device: "auto" spreads it over all GPUs that the process sees (accelerate's device map). dtype: float32, bfloat16, float16, or nf4: linear
    layers but the head in 4 bits by bitsandbytes (QLoRA, arXiv 2305.14314), the rest and all products in bfloat16.
    attention: transformers' attn_implementation ("eager", "sdpa", ...); None = its default.
    Raises UserError for a name that is nowhere or holds only pickled weights, DataError when the files lack weights that the model needs,
    ConfigError for an unknown dtype, for nf4 without bitsandbytes, or for remote code without a pinned commit.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if dtype == FOUR_BIT and find_spec("bitsandbytes") is None:
        raise ConfigError("dtype nf4 needs bitsandbytes, which is not installed", remedy="pip install 'gradsift[four-bit]'")
    path, revision = locate(name, revision, trust_remote_code)
    if revision is None:
        _refuse_pickles(Path(path))
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if str(device) == "auto":
        extra["device_map"] = "auto"
    if dtype == FOUR_BIT:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
        )
        extra.setdefault("device_map", {"": torch.device(device)})
    try:
        with quiet():
            # A resolved commit, not "main": for "main" transformers may fetch weights from a conversion bot's pull request.
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
        raise IntegrityError(f"the weights cannot be read ({error})", where=name, remedy="Download or copy the model again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(name, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise DataError(
            f"{len(missing)} weights of the model are not in its files and would be random: {some(missing)}",
            where=name,
            remedy="Give a complete causal language model (for an adapter, give its base model here).",
        )
    if str(device) != "auto" and not getattr(model, "is_quantized", False):
        model = model.to(device)
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    return model.eval()


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
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise UserError(
            f"only pickled weights ({some(pickled)}), which can run code when loaded",
            where=folder,
            remedy="Where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors.",
        )
    raise UserError("no *.safetensors weights in this folder", where=folder, remedy="Give the folder that holds them.")


# ---- identity ----


def quantiser(dtype: str) -> dict[str, str]:
    """What the numbers of a model in 4 bits depend on besides the model and torch."""
    return {"bitsandbytes": version("bitsandbytes")} if dtype == FOUR_BIT else {}


def model_identity(name: str, revision: str | None = None) -> dict[str, str]:
    """What a recipe digest says of a model or adapter: never a path, the same on every machine.

    A folder (or built-in model): {"kind", "digest"}, the xxh3-128 over the names and bytes of config.json and *.safetensors in name order.
    An adapter folder: the same, its config taken without the path of the base model and without library versions.
    A hub name: {"kind": "hub", "name", "revision": commit}. Raises as `load_model` does.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and (folder / ADAPTER_CONFIG).is_file():
        config = {k: v for k, v in _adapter_json(folder).items() if k not in ("base_model_name_or_path", "peft_version")}
        for key, value in config.items():  # peft keeps these names in sets, whose order changes from process to process
            if isinstance(value, list):
                config[key] = sorted(value, key=str)
        total = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
        return {"kind": "adapter", "digest": _fold(total, [_adapter_file(folder)])}
    path, commit = locate(name, revision, False)
    if commit is not None:
        return {"kind": "hub", "name": name, "revision": commit}
    weights = [p for p in Path(path).iterdir() if p.suffix == ".safetensors" and p.name != ADAPTER_WEIGHTS]
    if not weights:
        _refuse_pickles(Path(path))
    return {"kind": "folder", "digest": _fold(xxhash.xxh3_128(), [Path(path) / "config.json", *sorted(weights)])}


def _fold(total: xxhash.xxh3_128, files: Sequence[Path]) -> str:
    for path in files:
        one = xxhash.xxh3_128()
        with path.open("rb") as stream:
            while block := stream.read(1 << 23):
                one.update(block)
        total.update(f"{path.name}\0{one.hexdigest()}\n".encode())
    return total.hexdigest()


# ---- LoRA ----


def attach_lora(model: PreTrainedModel, settings: LoraSettings | None = None) -> PeftModel:
    """`model` with fresh LoRA layers (in place, as peft does; `remove_lora` undoes it), in its present mode, only LoRA trainable.

    targets: "attention" (the linear layers inside attention modules: q, k, v, o or the family's fused ones), "all-linear" (every linear
    layer but the output head), or names as peft takes them.

    The initial weights depend on `settings.seed` and the model's shape alone; the caller's random state is left as it was. LoRA weights are
    float32 also on a half-precision base. Raises ConfigError when no layer fits `targets`, MismatchError when there is LoRA already.
    """
    settings = settings or LoraSettings()
    _require_bare(model)
    targets = lora_targets(model, settings.targets) if isinstance(settings.targets, str) else list(settings.targets)
    chosen = [m for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)]
    if not chosen:
        raise ConfigError(
            f"no layer of {type(model).__name__} is named {' or '.join(map(repr, targets))}",
            remedy=f"Layers: {some(sorted({n.rpartition('.')[2] for n in block_linears(model)}), 12)}.",
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=all(isinstance(m, Conv1D) for m in chosen),
    )
    return _inject(model, config, settings.seed)


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    training = model.training
    config.base_model_name_or_path = None  # peft puts the model's own name here, and would warn of a base that has moved
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        peft = get_peft_model(model, config)
    return cast(PeftModel, peft.train(training))


def _require_bare(model: nn.Module) -> None:
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise MismatchError("the model has adapter layers already", remedy="Take them off with remove_lora, or load the base model again.")


def remove_lora(model: PeftModel) -> PreTrainedModel:
    """The base model without the LoRA layers, its own layers the same objects as before. All its parameters are left frozen."""
    return cast(PreTrainedModel, cast(Any, model).unload())


def _adapter_json(path: Path) -> dict[str, Any]:
    if not (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"no {ADAPTER_CONFIG} in this folder", where=path, remedy="Give a peft adapter folder.")
    try:
        return dict(json.loads((path / ADAPTER_CONFIG).read_bytes()))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"not a JSON object ({error})", where=path / ADAPTER_CONFIG, remedy="Copy the adapter again.") from error


def _adapter_file(path: Path) -> Path:
    if not (path / ADAPTER_WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            remedy = "Load it where you trust it and save it again: save_pretrained writes safetensors."
            raise UserError("the adapter is pickled (adapter_model.bin)", where=path, remedy=remedy)
        raise UserError(f"no {ADAPTER_WEIGHTS} in this folder", where=path, remedy="Give a complete peft adapter folder.")
    return path / ADAPTER_WEIGHTS


def read_adapter_config(path: str | Path) -> LoraConfig:
    """The LoRA settings of an adapter folder. Raises MismatchError for an adapter of another kind."""
    path = Path(path)
    kind = _adapter_json(path).get("peft_type")
    if kind != "LORA":
        raise MismatchError(f"the adapter is of kind {kind!r}, not LORA", where=path, remedy="Train a LoRA adapter.")
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(path)))
    config.inference_mode = False  # else peft freezes the very weights whose gradients are wanted
    return config


def load_adapter(base: PreTrainedModel | PeftModel, path: str | Path) -> PeftModel:
    """`base` with the LoRA adapter of a peft folder, in eval mode, LoRA trainable and float32. A PeftModel loses its present adapter first.

    Strict: raises MismatchError that names missing keys, unexpected keys and other shapes, after which `base` is bare again; UserError for
    a folder without a safetensors adapter.
    """
    path = Path(path)
    config = read_adapter_config(path)
    weights = _adapter_weights(_adapter_file(path))
    model = remove_lora(base) if isinstance(base, PeftModel) else base
    _require_bare(model)
    try:
        peft = _inject(model, config, seed=0)
    except ValueError as error:  # peft finds none of the target modules
        what = f"the adapter does not fit {type(model).__name__} ({error})"
        raise MismatchError(what, where=path, remedy="Give the adapter's own base model.") from error
    try:
        _check_keys(weights, adapter_state(peft), path)
    except MismatchError:
        remove_lora(peft)
        raise
    set_peft_model_state_dict(peft, weights)
    return cast(PeftModel, peft.eval())


def _adapter_weights(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            checked = "xxh3" in (opened.metadata() or {})
        return read_tensors(file) if checked else load_file(file)
    except SafetensorError as error:
        raise IntegrityError(f"cannot be read ({error})", where=file, remedy="Copy the adapter again.") from error


def adapter_state(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's weights under the names of peft's files (without the adapter's name)."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _check_keys(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    kinds = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "other shapes": sorted(k for k in expected.keys() & found.keys() if found[k].shape != expected[k].shape),
    }
    faults = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names)
    if faults:
        raise MismatchError(f"the adapter does not fit this model ({faults})", where=path, remedy="Give the adapter's own base model.")

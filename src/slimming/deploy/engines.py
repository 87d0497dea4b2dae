"""Four engines behind one small interface: open a network, or an artefact of it, with so many threads; run it on a batch.

torch is the network as it is, compile the same under torch.compile, onnxruntime and openvino read files or their bytes.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimming.errors import ConfigError, check_choice, check_number

READS = {  # which engines run a kind of file, the usual one first
    ".ckpt": ("torch", "compile"),
    ".pt2": ("torch", "compile"),
    ".safetensors": ("torch", "compile"),
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
}
PACKAGES = {"torch": "torch", "compile": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
EXTRAS = {"onnxruntime": "export", "openvino": "openvino"}  # that bring them
ENGINES = tuple(PACKAGES)
LARGEST_KEPT = 31 * 2**20  # bytes; glibc's threshold follows the largest block that was freed, up to 32 MiB
MOST_COMPILATIONS = 64  # of one forward: torch's own limit of 8 would let the ninth shape run uncompiled, silently

InputShape = tuple[int | None, ...]


@dataclass(frozen=True)
class Engine:
    """A network in an engine, ready to run; call it with (N, C, H, W) float32, it returns its (first) output.

    Attributes:
        name: one of ENGINES.
        shape: of its input, None for an axis that may have any size; None where the network does not say.
    """

    name: str
    threads: int
    shape: InputShape | None
    run: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.run(images)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_version(name: str) -> str | None:
    """Return the version of an engine's package, None where it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version(PACKAGES[name])
    return None


def open_engine(what: str | Path | bytes | nn.Module, name: str, threads: int = 1) -> Engine:
    """Open a network in an engine.

    Args:
        what: a file of a kind that the engine reads, the bytes of an ONNX file, or a network for torch and compile.
        name: one of ENGINES.
        threads: that one pass may use; 1 ... the cores there are.

    Raises:
        ConfigError: no such file, one that the engine does not read, an engine that is not installed, too many threads.
    """
    check_choice("the engine", name, ENGINES)
    check_number("threads", threads, 1, cores(), whole=True)
    if isinstance(what, str | Path):
        what = Path(what)
        if name not in READS.get(what.suffix, ()):
            readable = ", ".join(suffix for suffix, engines in READS.items() if name in engines)
            raise ConfigError(f"{what} cannot be run by {name}, which runs {readable}")
        if not what.is_file():
            raise ConfigError(f"there is no file {what}")
    opened = {"onnxruntime": _onnxruntime, "openvino": _openvino}.get(name)
    if opened is not None:
        package = _package(name)
        try:
            return opened(package, what, threads)
        except Exception as error:  # each engine has exceptions of its own for a damaged file
            what = what if isinstance(what, Path) else "the model"
            raise ConfigError(f"{what} cannot be read by {name}: {' '.join(str(error).split())[:300]}") from error
    return _torch(what, name, threads)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise ConfigError(f"{name} is not installed: pip install 'slimming[{EXTRAS[name]}]'") from error


# --- onnxruntime and OpenVINO -----------------------------------------------------------------------------------------


def _onnxruntime(ort: Any, what: Path | bytes, threads: int) -> Engine:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors alone
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads would burn the others' cores
    content = what if isinstance(what, bytes) else str(what)
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (entry,), output = session.get_inputs(), session.get_outputs()[0].name
    shape = tuple(size if isinstance(size, int) else None for size in entry.shape)
    return Engine("onnxruntime", threads, shape, lambda images: session.run([output], {entry.name: images})[0])


def _openvino(openvino: Any, what: Path | bytes, threads: int) -> Engine:
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # what is not quantised stays as exact as in the other engines
        "ENABLE_CPU_PINNING": False,  # the system may move threads off a busy core, as it may those of the others
    }
    core = openvino.Core()
    model = core.read_model(what if isinstance(what, bytes) else str(what))
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    sizes = compiled.input(0).partial_shape
    shape = tuple(size.get_length() if size.is_static else None for size in sizes)

    def run(images: np.ndarray) -> np.ndarray:
        request.infer([images], share_inputs=True)
        return request.get_output_tensor(0).data.copy()

    return Engine("openvino", threads, shape, run)


# --- torch ------------------------------------------------------------------------------------------------------------


def _settle_allocator() -> None:
    """Let glibc keep freed memory, as it does once a process has freed a large block: before, it gives large ones back.

    Their pages are then fetched anew in every pass, in one process and not in another, for as long as small layers take.
    """
    torch.empty(LARGEST_KEPT // 4)  # freed at once


def _torch(what: Path | nn.Module, name: str, threads: int) -> Engine:
    _settle_allocator()
    model, shape = (what.eval(), None) if isinstance(what, nn.Module) else _read_network(what)
    floats = (t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    dtype = next(floats, torch.float32)
    forward = torch.compile(model, dynamic=False) if name == "compile" else model

    def run(images: np.ndarray) -> np.ndarray:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.no_grad():  # under inference_mode torch.compile would compile once more
            out = forward(torch.from_numpy(images).to(dtype))
        while not isinstance(out, torch.Tensor):  # detectors have several outputs
            out = next(iter(out.values() if isinstance(out, dict) else out))
        return out.numpy()

    if name == "torch":
        return Engine(name, threads, shape, run)

    def run_compiled(images: np.ndarray) -> np.ndarray:
        import torch._dynamo
        import torch._inductor.config

        limits = torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True)
        with limits, torch._inductor.config.patch(freezing=True):  # weights are constants, packed for the convolutions
            return run(images)

    return Engine(name, threads, shape, run_compiled)


def _read_network(path: Path) -> tuple[nn.Module, InputShape | None]:
    """Read the network of a checkpoint or an export for torch, with the shape of its input where that is known."""
    if path.suffix in (".ckpt", ".safetensors"):
        from slimming import checkpoint
        from slimming.deploy import safetensors_format

        saved = checkpoint.read(path) if path.suffix == ".ckpt" else safetensors_format.read(path)
        seen = saved.record.data or {}
        known = {"in_channels", "image_size"} <= seen.keys()
        shape = (None, seen["in_channels"], seen["image_size"], seen["image_size"]) if known else None
        return checkpoint.rebuild(saved), shape
    try:
        program = torch.export.load(path)
        (entry,) = program.graph_signature.user_inputs
        sizes = next(node.meta["val"].shape for node in program.graph.nodes if node.name == entry)
        return program.module(), tuple(size if isinstance(size, int) else None for size in sizes)
    except Exception as error:
        raise ConfigError(f"{path} is no program of torch.export: {' '.join(str(error).split())[:300]}") from error


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch back in the end the number of threads that it has now: engines set it, and it is one for the process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)

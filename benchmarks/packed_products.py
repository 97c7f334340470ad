"""Products with packed weights against the fastest dense ones, on the shapes of a decoder and on a whole decoding step.

    python benchmarks/packed_products.py                                 # Llama-7B's seven matrices, bfloat16
    python benchmarks/packed_products.py --dtype float16 --batches 1,8 --sparsities 0.7
    python benchmarks/packed_products.py --whole --layers 32             # decoding and prefill of Llama-7B's shape
    python benchmarks/packed_products.py --profile --layers 32           # which kernels take their time
    python benchmarks/packed_products.py --others                        # the products by other libraries

Needs CUDA and this checkout. Weights are random, and zero where a random number says so. Prints one JSON line per
measurement. Products are captured in a CUDA graph, a layer's seven after one another over so many layers that the
caches keep none (a gigabyte dense); times are medians over replays, for one layer:

    cublas_us, gemv_us     torch's linear, and a kernel of this file that streams a dense matrix as fast as it can
    joint_us               torch's linear where what reads the same input (q, k and v; gate and up) is one matrix
    apart_us               the seven products from gap codes
    packed_us              from gap codes, what reads the same input in one product, as packed models do
    over_cublas, over_gemv how many times as fast as the fastest of torch's, and as that kernel
    bytes                  of the packed weights over the dense ones
    error, dense_error     ‖y - y₆₄‖ / ‖y₆₄‖ against float64

With --whole: tokens per second as eval=speed measures them, with a static cache and a CUDA graph per step. With
--profile: microseconds and launches of a step of decoding and of a prefill by kind of kernel (torch's profiler), of all
kernels and from begin to end, and what the bytes of the weights over these seconds come to. With --others: the products
by what else is installed, with its version, or why it gave none; zeros are random, of 2:4, or of tiles of 64 × 64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.numerics.gap_codes import decode, encode, product, stack
from alps_exp.numerics.nvrtc import Kernel
from alps_exp.patterns import NM, parse_sparsity

# One row a warp, 16 bytes a thread at a time, four of them in flight; bfloat16 and one row of activations only.
GEMV = """
typedef unsigned int u32;
__device__ __forceinline__ float lower(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float upper(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float dot(u32 a, u32 b) { return lower(a) * lower(b) + upper(a) * upper(b); }
__device__ __forceinline__ uint4 read(const uint4* place) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(place));
    return v;
}
extern "C" __global__ void gemv(const uint4* w, const uint4* x, unsigned short* y, int rows, int cols) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x & 31, row = blockIdx.x * 8 + threadIdx.x / 32, n = cols / 8;
    asm volatile("griddepcontrol.launch_dependents;");
    w += (long long)row * n;
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) if (lane + 32 * i < n) v[i] = read(w + lane + 32 * i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = threadIdx.x; i < n; i += 256) shared[i] = x[i];
    __syncthreads();
    float sum = 0;
    for (int base = lane; base < n; base += 128)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = base + 32 * i;
            if (at >= n) break;
            const uint4 a = v[i], b = shared[at];
            sum += dot(a.x, b.x) + dot(a.y, b.y) + dot(a.z, b.z) + dot(a.w, b.w);
            if (at + 128 < n) v[i] = read(w + at + 128);
        }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (!lane) asm("{.reg .b16 h; cvt.rn.bf16.f32 h, %1; st.global.b16 [%0], h;}" ::"l"(y + row), "f"(sum) : "memory");
}
"""
SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
DEVICE = torch.device("cuda", 0)


def timed(run: Callable[[], object], repeat: int = 25, graph: bool = True) -> float:
    """Median microseconds of what `run` launches, as one graph."""
    run()
    if graph:
        stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()
            stream.synchronize()
            with torch.cuda.graph(captured, stream=stream):
                run()
        run = captured.replay
    times = []
    for _ in range(repeat + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return median(times[3:])


def pruned(weight: Tensor, sparsity: float) -> Tensor:
    """With a random share of zeros."""
    return torch.where(torch.rand(weight.shape, device=weight.device) < sparsity, 0, weight)


def say(**row) -> None:
    """A JSON line."""
    about = {"device": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__}
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps({**about, **rounded}), flush=True)


def joined(layer: list, how: Callable) -> list:
    """A layer's seven matrices, those that read the same input one below the other."""
    return [how(layer[:3]), layer[3], how(layer[4:6]), layer[6]]


def products(dtype: torch.dtype, sparsities: list[float], batches: list[int], layers: int) -> None:
    """All products of some layers, dense and packed."""
    dense = [
        torch.randn(shape, device=DEVICE, dtype=dtype) / shape[1] ** 0.5 for _ in range(layers) for shape in SHAPES
    ]
    inputs = {width: torch.randn(max(batches), width, device=DEVICE, dtype=dtype) for width in (4096, 11008)}
    cublas = {n: timed(lambda n=n: [linear(inputs[w.shape[1]][:n], w) for w in dense]) / layers for n in batches}
    wide = [w for i in range(0, len(dense), 7) for w in joined(dense[i : i + 7], torch.cat)]
    joint = {n: timed(lambda n=n: [linear(inputs[w.shape[1]][:n], w) for w in wide]) / layers for n in batches}
    wide.clear()
    gemv = float("nan")
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(DEVICE) >= (9, 0):
        kernel, out = Kernel(GEMV, "gemv", {}, DEVICE, 0), torch.empty(11008, device=DEVICE, dtype=dtype)

        def stream() -> None:
            for w in dense:
                kernel(w.shape[0] // 8, 256, [w, inputs[w.shape[1]], out, *w.shape], w.shape[1] * 2, early=True)

        gemv = timed(stream) / layers
        exact = dense[-1].double() @ inputs[11008][0].double()
        if float((out[:4096].double() - exact).norm() / exact.norm()) > 1e-2:
            raise RuntimeError("the dense kernel is wrong")
    size = sum(w.nbytes for w in dense)
    for sparsity in sparsities:
        sparse = [pruned(w, sparsity) for w in dense]
        packed = [encode(w) for w in sparse]
        if not all(torch.equal(decode(c), w) for c, w in zip(packed[:7], sparse, strict=False)):
            raise RuntimeError("the packed weights are not the dense ones")
        stacked = [c for i in range(0, len(packed), 7) for c in joined(packed[i : i + 7], stack)]
        for n in batches:
            apart, us = (
                timed(lambda of=of, n=n: [product(inputs[c.cols][:n], c) for c in of]) / layers
                for of in (packed, stacked)
            )
            errors = []
            for w, c in zip(joined(sparse[:7], torch.cat), stacked[:4], strict=True):
                x = inputs[c.cols][:n]
                exact = x.double() @ w.double().T
                errors.append(
                    [float((y.double() - exact).norm() / exact.norm()) for y in (product(x, c), linear(x, w))]
                )
            say(
                dtype=str(dtype).removeprefix("torch."), sparsity=sparsity, batch=n, bits=packed[0].bits,
                cublas_us=cublas[n], joint_us=joint[n], gemv_us=gemv if n == 1 else float("nan"),
                apart_us=apart, packed_us=us, over_cublas=min(cublas[n], joint[n]) / us,
                over_gemv=gemv / us if n == 1 else float("nan"), bytes=sum(c.nbytes for c in packed) / size,
                error=max(e[0] for e in errors), dense_error=max(e[1] for e in errors),
            )  # fmt: skip


def others(dtype: torch.dtype, sparsities: list[float], batches: list[int], layers: int) -> None:
    """The products by other libraries, each against torch's dense ones."""
    dense = [
        torch.randn(shape, device=DEVICE, dtype=dtype) / shape[1] ** 0.5 for _ in range(layers) for shape in SHAPES
    ]
    inputs = {width: torch.randn(max(batches), width, device=DEVICE, dtype=dtype) for width in (4096, 11008)}

    def attempt(runtime: str, zeros: str, convert: Callable, multiply: Callable = linear) -> None:
        try:
            weights = [convert(w) for w in dense]
            for n in batches:
                for graph in (True, False):
                    about = {"runtime": runtime, "zeros": zeros, "batch": n, "graph": graph}
                    run = partial(lambda n: [multiply(inputs[w.shape[1]][:n], w) for w in weights], n)
                    try:
                        us = timed(run, graph=graph) / layers
                    except RuntimeError as error:
                        torch.cuda.synchronize()
                        say(**about, failed=str(error).splitlines()[0][:200])
                        continue
                    say(**about, us=us, over_cublas=cublas[n] / us)
                    break
        except Exception as error:  # whatever another library raises is its answer
            say(runtime=runtime, zeros=zeros, failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])

    def by_pattern(w: Tensor, pattern) -> Tensor:
        return w.masked_fill(~pattern.keep(w.float().abs()), 0)

    def in_torchao(w: Tensor, config) -> Tensor:
        from torchao.sparsity import sparsify_

        made = torch.nn.Linear(*reversed(w.shape), bias=False, device=DEVICE, dtype=dtype)
        made.weight.data = w
        sparsify_(made, config)
        return made.weight

    def rows(w: Tensor) -> Tensor:
        wide = w.to_sparse_csr()
        parts = (wide.crow_indices().int(), wide.col_indices().int(), wide.values())
        return torch.sparse_csr_tensor(*parts, size=w.shape)

    def version(package: str) -> str:
        return f"{package} {metadata.version(package)}"

    torch_version = f"torch {torch.__version__}"
    cublas = {n: timed(lambda n=n: [linear(inputs[w.shape[1]][:n], w) for w in dense]) / layers for n in batches}
    say(runtime=f"{torch_version}, cuBLAS", zeros="none", us=cublas)
    compiled = torch.compile(lambda x, w: linear(x, w), mode="max-autotune-no-cudagraphs", dynamic=False)
    attempt(f"{torch_version}, torch.compile, max-autotune", "none", lambda w: w, compiled)
    torch.compiler.reset()

    def without_bias(x: Tensor, w: Tensor) -> Tensor:  # torchao's wants to be told
        return linear(x, w, None)

    half, tiles, convert = NM(2, 4), parse_sparsity("block=64@0.9"), torch.sparse.to_sparse_semi_structured
    for sparsity in sparsities:
        zeros = f"{sparsity:.0%}"
        attempt("gap codes", zeros, lambda w, s=sparsity: encode(pruned(w, s)), product)
        attempt(
            f"{torch_version}, cuSPARSE CSR", zeros, lambda w, s=sparsity: rows(pruned(w, s)), lambda x, w: (w @ x.T).T
        )
    attempt("gap codes", "2:4", lambda w: encode(by_pattern(w, half)), product)
    for name, switch in (("CUTLASS", True), ("cuSPARSELt", False)):
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = switch
        attempt(f"{torch_version}, semi-structured, {name}", "2:4", lambda w: convert(by_pattern(w, half)))
    if importlib.util.find_spec("torchao") is None:
        say(runtime="torchao", failed="not installed")
        return
    from torchao.sparsity import block_sparse_weight, semi_sparse_weight

    name = version("torchao")
    attempt(f"{name}, semi_sparse_weight", "2:4", lambda w: in_torchao(by_pattern(w, half), semi_sparse_weight()))
    attempt("gap codes", "tiles, 90%", lambda w: encode(by_pattern(w, tiles)), product)
    attempt(
        f"{name}, block_sparse_weight",
        "tiles, 90%",
        lambda w: in_torchao(by_pattern(w, tiles), block_sparse_weight(64)),
        without_bias,
    )


def shaped(dtype: torch.dtype, layers: int):
    """A model of Llama-7B's shape with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.set_default_dtype(dtype)
    with DEVICE:
        config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, pad_token_id=0)
        network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return network


def thin(network, sparsity: float) -> None:
    """More zeros in its linear layers: as many as there should be in all."""
    for name, parameter in network.named_parameters():
        if "proj" in name:
            before = 1 - int(torch.count_nonzero(parameter)) / parameter.numel()
            parameter.data = pruned(parameter.data, (sparsity - before) / (1 - before))


def profile(dtype: torch.dtype, sparsities: list[float], layers: int, compiled: bool) -> None:
    """By kernel: a step of decoding one sequence, and a prefill of 2048 tokens."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from alps_exp.evaluation.speed import _decoder, _forward, _random
    from alps_exp.model.resident import nbytes, resident_as

    network, steps = shaped(dtype, layers), 16
    ids = _random(network, (1, 2048), DEVICE)

    def prefill() -> None:
        for _ in range(4):
            _forward(network, ids)

    for form, sparsity in [("dense", 0.0), *(("packed", each) for each in sorted(sparsities))]:
        thin(network, sparsity)
        with resident_as(network, form, DEVICE):
            weights = {"packed product": nbytes(network.model.layers)}
            weights["dense"] = nbytes(network.lm_head) + (weights["packed product"] if form == "dense" else 0)
            decoder = _decoder(network, DEVICE, 1, 128, steps, compiled)
            for what, run, reset, times in (
                ("step", decoder.run, decoder.reset, steps),
                ("prefill", prefill, lambda: None, 4),
            ):
                for _ in range(2):
                    reset()
                    run()
                reset()
                torch.cuda.synchronize()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                wall = begin.elapsed_time(end) * 1000 / times
                reset()
                with profiler(activities=[ProfilerActivity.CUDA]) as found:
                    run()
                    torch.cuda.synchronize()
                kinds: dict[str, list] = {}
                for event in found.key_averages():
                    if event.self_device_time_total:
                        row = kinds.setdefault(kind(event.key), [0.0, 0.0])
                        row[0] += event.self_device_time_total / times
                        row[1] += event.count / times
                about = {"form": form, "sparsity": sparsity, "of": what}
                for name, (us, launches) in sorted(kinds.items(), key=lambda item: -item[1][0]):
                    read = {"tb_s": weights[name] / us / 1e6} if what == "step" and name in weights else {}
                    say(**about, kernels=name, us=us, launches=launches, **read)
                say(**about, kernels="all", us=sum(us for us, _ in kinds.values()), wall_us=wall)


def kind(kernel: str) -> str:
    """What a kernel of this name does."""
    known = {
        "packed product": ("product",), "unpack": ("unpack",), "attention": ("flash", "fmha", "attention"),
        "dense": ("gemm", "gemv", "nvjet", "cutlass", "splitk", "cublas", "dot_kernel"), "copy": ("Memcpy", "Memset"),
        "compiled": ("triton",),
    }  # fmt: skip
    return next((name for name, parts in known.items() if any(part in kernel for part in parts)), "small kernels")


def whole(dtype: torch.dtype, sparsities: list[float], batches: list[int], layers: int, compiled: bool) -> None:
    """Decoding and prefill of a model of Llama-7B's shape."""
    from alps_exp.evaluation.speed import Speed
    from alps_exp.model.blocks import BlockModel

    network = shaped(dtype, layers)
    for sparsity in sorted(sparsities):
        thin(network, sparsity)
        forms = ("dense", "packed")
        speed = Speed(forms, batches, compiled=compiled)
        for figure in speed.measure(BlockModel(network, DEVICE, offload=False), (), None):
            row = {"model": f"Llama-7B's shape, {layers} layers", "sparsity": sparsity, "form": figure.subject}
            say(**row, metric=figure.metric, value=figure.value, unit=figure.unit, **figure.more)


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sparsities", default="0.5,0.7,0.8,0.9")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--layers", type=int, default=3, help="of the products, and of the whole model")
    parser.add_argument("--whole", action="store_true", help="the whole model instead of the products")
    parser.add_argument("--others", action="store_true", help="the products by other libraries instead")
    parser.add_argument("--profile", action="store_true", help="the whole model's time by kernel")
    parser.add_argument("--compiled", action="store_true", help="decode the whole model through torch.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs CUDA")
    torch.manual_seed(0)
    dtype, sparsities = getattr(torch, options.dtype), [float(item) for item in options.sparsities.split(",")]
    batches = [int(item) for item in options.batches.split(",")]
    if options.profile:
        profile(dtype, sparsities, options.layers, options.compiled)
    elif options.others:
        others(dtype, sparsities, batches, options.layers)
    elif options.whole:
        whole(dtype, sparsities, batches, options.layers, options.compiled)
    else:
        products(dtype, sparsities, batches, options.layers)


if __name__ == "__main__":
    with torch.no_grad():
        main()

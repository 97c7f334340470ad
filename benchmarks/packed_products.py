"""Products with packed weights against the fastest dense ones, on the shapes of a decoder and on a whole decoding step.

    python benchmarks/packed_products.py                                 # Llama-7B's seven matrices, bfloat16
    python benchmarks/packed_products.py --dtype float16 --batches 1,8 --sparsities 0.7
    python benchmarks/packed_products.py --whole --layers 32             # and decoding and prefill of Llama-7B's shape

Needs CUDA and this checkout. Weights are random, and zero where a random number says so. Prints one JSON line per
measurement. Products are captured in a CUDA graph, a layer's seven after one another over so many layers that the
caches keep none (a gigabyte dense); times are medians over replays, for one layer:

    cublas_us, gemv_us     torch's linear, and a kernel of this file that streams a dense matrix as fast as it can
    packed_us              the same products from gap codes
    over_cublas, over_gemv how many times as fast
    bytes                  of the packed weights over the dense ones
    error, dense_error     ‖y - y₆₄‖ / ‖y₆₄‖ against float64

With --whole: tokens per second as eval=speed measures them, with a static cache and a CUDA graph per step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.numerics.gap_codes import decode, encode, product
from alps_exp.numerics.nvrtc import Kernel

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


def timed(run: Callable[[], object], repeat: int = 25) -> float:
    """Median microseconds of a graph of what `run` launches."""
    run()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
    times = []
    for _ in range(repeat + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
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


def products(dtype: torch.dtype, sparsities: list[float], batches: list[int], layers: int) -> None:
    """All products of some layers, dense and packed."""
    dense = [
        torch.randn(shape, device=DEVICE, dtype=dtype) / shape[1] ** 0.5 for _ in range(layers) for shape in SHAPES
    ]
    inputs = {width: torch.randn(max(batches), width, device=DEVICE, dtype=dtype) for width in (4096, 11008)}
    cublas = {n: timed(lambda n=n: [linear(inputs[w.shape[1]][:n], w) for w in dense]) / layers for n in batches}
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
        for n in batches:
            us = timed(lambda packed=packed, n=n: [product(inputs[c.cols][:n], c) for c in packed]) / layers
            errors = []
            for w, c in zip(sparse[3:7], packed[3:7], strict=True):
                x = inputs[c.cols][:n]
                exact = x.double() @ w.double().T
                errors.append(
                    [float((y.double() - exact).norm() / exact.norm()) for y in (product(x, c), linear(x, w))]
                )
            say(
                dtype=str(dtype).removeprefix("torch."), sparsity=sparsity, batch=n, bits=packed[0].bits,
                cublas_us=cublas[n], gemv_us=gemv if n == 1 else float("nan"), packed_us=us, over_cublas=cublas[n] / us,
                over_gemv=gemv / us if n == 1 else float("nan"), bytes=sum(c.nbytes for c in packed) / size,
                error=max(e[0] for e in errors), dense_error=max(e[1] for e in errors),
            )  # fmt: skip


def whole(dtype: torch.dtype, sparsities: list[float], batches: list[int], layers: int, compiled: bool) -> None:
    """Decoding and prefill of a model of Llama-7B's shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from alps_exp.evaluation.speed import Speed
    from alps_exp.model.blocks import BlockModel

    torch.set_default_dtype(dtype)
    with DEVICE:
        config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, pad_token_id=0)
        network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for sparsity in sorted(sparsities):
        for name, parameter in network.named_parameters():
            if "proj" in name:  # more and more zeros: as many as there should be in all
                before = 1 - int(torch.count_nonzero(parameter)) / parameter.numel()
                parameter.data = pruned(parameter.data, (sparsity - before) / (1 - before))
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
    parser.add_argument("--compiled", action="store_true", help="decode the whole model through torch.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs CUDA")
    torch.manual_seed(0)
    measure = whole if options.whole else products
    sparsities = [float(item) for item in options.sparsities.split(",")]
    measure(
        getattr(torch, options.dtype), sparsities, [int(item) for item in options.batches.split(",")], options.layers
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()

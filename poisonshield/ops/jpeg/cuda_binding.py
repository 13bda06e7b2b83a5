"""The compiled JPEG kernels of csrc/jpeg.cu and csrc/jpeg_backward.cu, called as the reference is.

Tensors of any strides are read and written where they lie, in their own dtype. Exact mode equals the reference to the
bit; smooth mode agrees to float32's accuracy, so that a coefficient next to a tie may round the other way.
"""

import torch
from torch import Tensor

from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings

_ROUNDINGS = {"none": 0, "poly": 1, "ste": 2, "poly_ste": 3, "fourier": 4, "hard": 5}  # Rounding in csrc/include
_BLOCKS, _UNITS = 16, 4  # of a thread block: 8x8 pixels in 4:4:4, 16x16 in 4:2:0


def refusal(function: str, args: JpegArguments | JpegGradientArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if args.x.dtype == torch.float64 or args.tables.dtype == torch.float64:
        return "float64 is for the reference"
    if args.x.shape[2] * args.x.shape[3] * 3 >= 2**31:
        return "a picture of 2^31 numbers or more is for the reference"
    if len(args.x) * _chunks(args.x, args.settings) >= 2**31:
        return "the batch needs more thread blocks than a grid has"
    return None


def jpeg(args: JpegArguments) -> Tensor:
    """As the reference: one kernel for 4:4:4, two for 4:2:0."""
    out = torch.empty_like(args.x, dtype=args.out_dtype)
    if not out.numel():
        return out
    is_exact = args.mode == "exact"
    x = args.x if args.x.dtype in (out.dtype, torch.uint8) else args.x.float()
    target = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)
    planes = _planes(x, args.settings, torch.int8 if is_exact else torch.float32)
    torch.ops.poisonshield_cuda.jpeg_(
        target,
        planes,
        x,
        *_small(args.tables, args.affine),
        args.settings.subsampling == "420",
        _is_smooth(x, args.settings),
        is_exact,
        args.settings.integer_planes and not is_exact,
        _ROUNDINGS[args.settings.rounding],
        args.settings.fourier_terms,
    )
    return out if target is out else out.copy_(target)


def jpeg_backward(args: JpegGradientArguments) -> tuple[Tensor, Tensor]:
    """As the reference: one kernel for 4:4:4, two for 4:2:0."""
    dx = torch.empty_like(args.x)
    if not dx.numel():
        return dx, torch.zeros_like(args.tables) if args.table_grad else args.tables.new_empty(0)
    same = args.grad.dtype == args.x.dtype
    x, grad = (args.x, args.grad) if same else (args.x.float(), args.grad.float())
    target = dx if dx.dtype == x.dtype else torch.empty_like(dx, dtype=x.dtype)
    shape = (len(x), _chunks(x, args.settings), 2, 8, 8) if args.table_grad else (0,)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    torch.ops.poisonshield_cuda.jpeg_backward_(
        target,
        sums,
        _planes(x, args.settings, torch.float32),
        grad,
        x,
        *_small(args.tables, args.affine),
        args.settings.subsampling == "420",
        _is_smooth(x, args.settings),
        args.settings.integer_planes,
        _ROUNDINGS[args.settings.rounding],
        args.settings.fourier_terms,
        args.settings.clamp_grad,
    )
    dtables = sums.double().sum(1).to(args.tables.dtype) if args.table_grad else args.tables.new_empty(0)
    return dx if target is dx else dx.copy_(target), dtables


def _small(tables: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Tables as the kernels read them, [B, 2, 8, 8] with samples any stride apart, and affine [2, 3]; both float32."""
    if tables[:1].is_contiguous():  # one table for all, expanded, stays so
        return tables.float(), affine.float().contiguous()
    return tables.float().contiguous(), affine.float().contiguous()


def _is_smooth(x: Tensor, settings: JpegSettings) -> bool:
    """Whether chrominance is enlarged by the triangle filter: up to two columns are copied, as in libjpeg."""
    return settings.upsample == "fancy" and (x.shape[3] + 1) // 2 > 2


def _units(x: Tensor) -> int:
    """Units of 16x16 pixels of a picture."""
    return -(-x.shape[2] // 16) * -(-x.shape[3] // 16)


def _chunks(x: Tensor, settings: JpegSettings) -> int:
    """Thread blocks of a picture."""
    if settings.subsampling == "420":
        return -(-_units(x) // _UNITS)
    return -(-(-(-x.shape[2] // 8) * -(-x.shape[3] // 8)) // _BLOCKS)


def _planes(x: Tensor, settings: JpegSettings, dtype: torch.dtype) -> Tensor:
    """Room for decoded planes between the kernels of 4:2:0: 256 and 2 * 64 samples a unit."""
    size = len(x) * _units(x) * 384 if settings.subsampling == "420" else 0
    return torch.empty(size, dtype=dtype, device=x.device)

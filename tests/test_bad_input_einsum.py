"""einsum: every refusal names the argument, what it should be and what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sm120_ops
from sm120_ops import einsum

BHR = "bhr,hdr->bhd"
B, H, R, D = 6, 4, 64, 40


def refused(
    arg: str, requirement: str, got: str, kind: type[Exception] = ValueError, op: str = "einsum"
) -> pytest.RaisesExc:
    return pytest.raises(kind, match=rf"^sm120_ops.{op}: {arg}: expected {requirement}, got {got}")


def operands(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(B, H, R, device=device).bfloat16()
    return x, torch.randn(H, D, R, device=device).bfloat16()


def pairs(device: torch.device) -> tuple[Any, Any]:
    """FP8 tokens and weights with byte scales, which need no layout."""
    found = []
    for x in operands(device):
        data, scale = sm120_ops.quantize(x.flatten(0, 1), "mxfp8", 32)
        scales = sm120_ops.unpack_scales(scale, R // 32)
        found.append((data.view(x.shape), scales.unflatten(0, x.shape[:2])))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("", "not of the form"),
        ("bhr", "not of the form"),
        ("bhr,hdr", "not of the form"),
        ("bhr,hdr->", "not of the form"),
        ("bhr->bhd", "not of the form"),
        ("bhr,hdr,d->bhd", "not of the form"),
        ("bhr,hdr->bhd->b", "not of the form"),
        ("bhr;hdr->bhd", "not of the form"),
        ("...r,dr->...d", "not of the form"),
        ("b1r,1dr->b1d", "not of the form"),
        ("bhr,hdr=>bhd", "not of the form"),
        ("βhr,hdr->βhd", "not of the form"),
        ("bhh,hdr->bhd", "an index twice in 'bhh'"),
        ("bhr,hdr->bbd", "an index twice in 'bbd'"),
        ("bhr,hds->bhd", "index 'r' in one place only"),
        ("bhr,hdr->bhdx", "index 'x' in one place only"),
        ("bhr,hdr->bdh", "'h', which is in all three, is D's last"),
        ("hr,hdr->hd", "0 indices of A and 1 of B alone are D's"),
        ("abhr,hdr->abhd", "2 indices of A and 1 of B alone are D's"),
        ("ghbr,ghdr->ghbd", "2 in all three, 1 summed over"),
        ("gbmk,gbnk->gmn", "1 in all three, 2 summed over"),
        ("m,n->mn", "0 in all three, 0 summed over"),
        ("mxyz,nxyz->mn", "0 in all three, 3 summed over"),
    ],
)
def test_equations(equation: str, reason: str) -> None:
    x = torch.zeros(2, 2, 2, dtype=torch.bfloat16)
    with refused("equation", "'bhr,hdr->bhd', 'bhd,hdr->bhr', .*", f".*{reason}.*"):
        einsum(equation, x, x)


def test_equation_is_a_string() -> None:
    x = torch.zeros(2, 2, 2, dtype=torch.bfloat16)
    with refused("equation", "a string", "list", TypeError):
        einsum(["bhr", "hdr"], x, x)  # type: ignore[arg-type]


def test_operands(device: torch.device) -> None:
    x, w = operands(device)
    with refused("a", "dtype torch.bfloat16", "torch.float16", TypeError):
        einsum(BHR, x.half(), w)
    with refused("b", "dtype torch.bfloat16", "torch.float32", TypeError):
        einsum(BHR, x, w.float())
    with refused("a", "3 dimensions", r"\[6, 4\]"):
        einsum(BHR, x[..., 0], w)
    with refused("b", "h=4 as in a", "h=3"):
        einsum(BHR, x, w[:3])
    with refused("b", "r=64 as in a", "r=56"):
        einsum(BHR, x, w[..., :56])
    with refused("b", "a bfloat16 tensor, as the other operand, or both .*", "Tensor", TypeError):
        einsum(BHR, pairs(device)[0], w)
    with refused("a", "a bfloat16 tensor, as the other operand, or both .*", "list", TypeError):
        einsum(BHR, [1.0], w)  # type: ignore[arg-type]
    lines = "one stride to be 1 and the other a multiple of 8 .*"
    odd = torch.zeros(B * H * 68 + 1, dtype=torch.bfloat16, device=device)
    with refused("a", lines, "strides"):
        einsum(BHR, odd[:-1].view(B, H, 68)[..., ::2][..., :34], w[..., :34])
    with refused("a", lines, "strides"):
        einsum(BHR, x[:1].expand(B, -1, -1), w)
    with refused("b", lines, "strides"):  # the other operand has D's rows
        einsum("hdr,bhr->bhd", w[..., :34], odd[:-1].view(B, H, 68)[..., ::2][..., :34])
    shifted = odd[1 : 1 + B * H * R].view(B, H, R)
    with refused("a", "a 16-byte aligned data pointer", "0x"):
        einsum(BHR, shifted, w)
    with refused("a", "a tensor that needs no gradient .*", "requires", RuntimeError):
        einsum(BHR, x.clone().requires_grad_(), w)
    with refused("out_dtype", "torch.bfloat16 or torch.float32", "torch.float16"):
        einsum(BHR, x, w, out_dtype=torch.float16)


def test_c_and_out(device: torch.device) -> None:
    x, w = operands(device)
    c = torch.zeros(B, H, D, device=device)
    with refused("c", "dtype torch.bfloat16", "torch.float32", TypeError):
        einsum(BHR, x, w, c=c, out_dtype=torch.bfloat16)
    with refused("c", r"shape \[6, 4, 40\]", r"\[4, 6, 40\]"):
        einsum(BHR, x, w, c=c.transpose(0, 1))
    with refused("c", "3 dimensions", r"\[40\]"):
        einsum(BHR, x, w, c=c[0, 0])
    with refused("c", "last stride 1", "strides"):
        einsum(BHR, x, w, c=torch.zeros(D, B, H, device=device).permute(1, 2, 0))
    with refused("out", r"shape \[6, 4, 40\]", r"\[6, 4, 48\]"):
        einsum(BHR, x, w, out=torch.zeros(B, H, 48, device=device))
    with refused("out", "dtype torch.bfloat16 or torch.float32", "torch.float16", TypeError):
        einsum(BHR, x, w, out=c.half())
    with refused("out", "a torch.Tensor", "list", TypeError):
        einsum(BHR, x, w, out=[c])  # type: ignore[arg-type]
    with refused("c", "a torch.Tensor", "float", TypeError):
        einsum(BHR, x, w, c=1.0)  # type: ignore[arg-type]
    with refused("out", r"dtype torch.bfloat16 \(out_dtype\)", "torch.float32", TypeError):
        einsum(BHR, x, w, out=c, out_dtype=torch.bfloat16)
    overlap = "rows and matrices that do not overlap"
    with refused("out", overlap, "strides"):
        einsum(BHR, x, w, out=c[:1].expand(B, -1, -1))
    with refused("out", overlap, "strides"):
        einsum(BHR, x, w, out=c.view(-1).as_strided((B, H, D), (80, 40, 1)))
    buffer = torch.zeros(B + 1, H, D, device=device)
    with refused("out", "memory apart from c", "overlapping memory"):
        einsum(BHR, x, w, c=buffer[1:], out=buffer[:-1])
    with refused("out", "memory apart from a", "overlapping memory"):
        einsum(BHR, x, w, out=x[..., :D])
    with refused("out", r"shape \[40, 40\]", r"\[40, 48\]"):
        einsum("bmk,bnk->mn", w, w, out=torch.zeros(D, 48, device=device))
    with refused("out", "a row stride >= 40", r"strides \[0, 1\]"):
        einsum("bmk,bnk->mn", w, w, out=c[0, :1].expand(D, -1))


def test_scaled(device: torch.device) -> None:
    (a, sfa), (b, sfb) = pairs(device)
    with refused("equation", ".*", ".*two indices summed over, of FP8 or FP4 operands"):
        einsum("bmk,bnk->mn", (b, sfb), (b, sfb))
    with refused("a", "dtype torch.float8_e4m3fn, .*", "torch.bfloat16", TypeError):
        einsum(BHR, (a.to(torch.bfloat16), sfa), (b, sfb))
    with refused("sfa", "3 dimensions", r"\[24, 2\]"):
        einsum(BHR, (a, sfa.flatten(0, 1)), (b, sfb))
    with refused("sfa", "2 columns .*", r"\[4, 6, 3\]"):
        einsum(BHR, (a, torch.cat((sfa, sfa[..., :1]), 2)), (b, sfb))
    with refused("sfb", r"\[4, rows, 2\] with .* rows .*", r"\[4, 39, 2\]"):
        einsum(BHR, (a, sfa), (b, sfb[:, 1:]))
    with refused("sfb", "dtype torch.int32, .*", "torch.int64", TypeError):
        einsum(BHR, (a, sfa), (b, sfb.long()))
    bad = sm120_ops.unpack_scales(sm120_ops.pack_scales(sfa.flatten(0, 1)), 2, torch.float32)
    bad[5, 1] = 3.0
    with refused("sfa", "float32 scales that are powers of two .*", "3.0 at row .*"):
        einsum(BHR, (a, bad.view(sfa.shape)), (b, sfb))
    with refused("gran_k_a", "32 or 128", "64"):
        einsum(BHR, (a, sfa), (b, sfb), gran_k_a=64)
    with refused("a", "K to be a multiple of 16 .*", "K=40"):
        einsum(BHR, (a[..., :40], sfa), (b[..., :40], sfb))
    with refused("a", "a (row|group) stride that is a multiple of 16 bytes.*", "strides"):
        wide = torch.zeros(B, H, R + 8, device=device, dtype=torch.uint8)
        einsum(BHR, (wide.view(torch.float8_e4m3fn)[..., :R], sfa), (b, sfb))
    fp4 = torch.zeros(H, D, R // 2, device=device, dtype=torch.uint8)
    with refused("b", "r=64 as in a", "r=32"):
        einsum(BHR, (a, sfa), (fp4[..., :16], sfb))
    with refused("b", "K to be a multiple of 32 for FP4", "K=40"):  # packed along r, D's last
        einsum("bhd,hdr->bhr", (a[..., :40], sfa), (fp4, sfb))


def test_raw_ops(device: torch.device) -> None:
    """The same from the ops themselves, by their own names."""
    x, w = operands(device)
    x = x.transpose(0, 1)
    ops = torch.ops.sm120
    kinds = (ValueError, RuntimeError)
    for op in (ops.bf16_batched_gemm, ops.bf16_batch_sum):
        name = op.default.name().removeprefix("sm120::")
        for args, text in (
            ((x, w[:3]), "b: expected 4 matrices as in a"),
            ((x, w[..., :56]), "b: expected K=64 as in a, got K=56"),
            ((x.float(), w), "a: expected dtype torch.bfloat16"),
            ((x[0], w), "a: expected 3 dimensions"),
            ((x[:, :, 4:], w[:, :, 4:]), "a: expected a 16-byte aligned data pointer"),
            ((x[..., ::2], w[..., ::2]), "a: expected one stride to be 1 and the other"),
        ):
            with pytest.raises((*kinds, TypeError), match=rf"sm120_ops.{name}: {text}"):
                op(*args, torch.float32)
            with pytest.raises((*kinds, TypeError), match=rf"sm120_ops.{name}: {text}"):
                op.out(*args, out=torch.zeros(H, B, D, device=device))
    out = torch.zeros(H, B, D, device=device)
    with pytest.raises(kinds, match=r"out: expected shape \[6, 4, 40\], got \[4, 6, 40\]"):
        ops.bf16_batched_gemm.out(x, w, None, True, out=out)
    with pytest.raises(kinds, match="out: expected rows and matrices that do not overlap"):
        ops.bf16_batched_gemm.out(x, w, out=out.view(-1).as_strided((H, B, D), (48, 40, 1)))
    with pytest.raises(kinds, match="memory apart from"):
        ops.bf16_batched_gemm.out(x, w, out=x[..., :D])
    with pytest.raises((*kinds, TypeError), match=r"c: expected (dtype|the dtype of out)"):
        ops.bf16_batched_gemm.out(x, w, out.bfloat16(), out=out)
    (a, sfa), (b, sfb) = pairs(device)
    packed = [
        sm120_ops.ops.groups.prepare_groups("einsum", "a", (data, scale), 32, False)[:2]
        for data, scale in ((a.transpose(0, 1), sfa.transpose(0, 1)), (b, sfb))
    ]
    (a, sfa), (b, sfb) = packed
    good = (a, sfa, b, sfb, 32, 32, torch.float32)
    assert ops.batched_gemm(*good).shape == (H, B, D)
    for at, bad, text in (
        (0, a[:3], "(a|b|sfa): expected"),
        (1, sfa[:, :5], r"sfa: expected packed scales of shape \[4, 6, 1\]"),
        (2, b[:, :, :48], "b: expected"),
        (3, sfb.long(), "sfb: expected dtype torch.int32"),
        (4, 64, "gran_k_a: expected 32 or 128"),
        (6, torch.float16, "out_dtype: expected torch.bfloat16 or torch.float32"),
    ):
        with pytest.raises((*kinds, TypeError), match=rf"sm120_ops.batched_gemm: {text}"):
            ops.batched_gemm(*good[:at], bad, *good[at + 1 :])
    if device.type == "cuda":
        torch.cuda.synchronize()
        assert ops.batched_gemm(*good).isfinite().all()

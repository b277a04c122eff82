"""DeepGEMM's API: names and signatures, install(), settings, casts and layouts."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import deep_gemm_api
import pytest
import torch
from compat_cases import BF16, FP32, Problem, powers, refused

import sm120_ops
from sm120_ops import compat
from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm import runtime, testing, utils
from sm120_ops.compat.deep_gemm.testing import calc_diff


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a new process."""
    monkeypatch.setattr(runtime, "_settings", runtime._Settings())
    yield
    compat.uninstall()


# ---- Names and signatures ------------------------------------------------------------------------


def parameters(text: str) -> list[inspect.Parameter]:
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def function({text}): ...", scope)
    return list(inspect.signature(scope["function"]).parameters.values())


def check_signature(function: Any, text: str) -> None:
    """The parameters that the table names come first; whatever follows has a default."""
    wanted = parameters(text)
    found = list(inspect.signature(function).parameters.values())
    for one, other in itertools.zip_longest(found, wanted):
        if other is None:
            keywords = one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
            assert keywords or one.default is not one.empty, f"{one} has no default"
            continue
        assert (one.name, one.kind) == (other.name, other.kind)
        # Those of init() are given by DeepGEMM alone.
        assert one.default == other.default or other.default is other.empty, one.name


@pytest.mark.parametrize("name", deep_gemm_api.API)
def test_signature(name: str) -> None:
    assert name in deep_gemm.__all__
    check_signature(getattr(deep_gemm, name), deep_gemm_api.API[name])


@pytest.mark.parametrize(
    ("module", "table"),
    [
        (utils.math, deep_gemm_api.MATH_API),
        (testing, deep_gemm_api.TESTING_API),
        (utils.dist, deep_gemm_api.DIST_API),
        (utils.layout, {n: deep_gemm_api.API[n] for n in deep_gemm_api.LAYOUT_NAMES}),
    ],
)
def test_signatures_of_submodules(module: types.ModuleType, table: dict[str, str]) -> None:
    for name, text in table.items():
        check_signature(getattr(module, name), text)
    if module is not utils.dist and module is not testing:
        for name in table:  # DeepGEMM has these at the top too
            assert getattr(deep_gemm, name) is getattr(module, name)
            assert getattr(utils, name) is getattr(module, name)


@pytest.mark.parametrize("name", deep_gemm_api.NEWER_CALLS)
def test_calls_of_the_newer_api_bind(name: str) -> None:
    positional, keywords = deep_gemm_api.NEWER_CALLS[name].split(";")
    arguments = [word for word in positional.split(",") if word.strip()]
    options = dict.fromkeys(keywords.split())
    inspect.signature(getattr(deep_gemm, name)).bind(*arguments, **options)


def test_nothing_public_beyond_the_tables() -> None:
    known = {*deep_gemm_api.API, *deep_gemm_api.MATH_API, *deep_gemm_api.LAYOUT_NAMES}
    known |= {*deep_gemm_api.NEWER_CALLS, *deep_gemm_api.DIST_API}
    newer = {"cast_back_from_fp8", "m_grouped_fp4_gemm_nt_masked", "testing", "utils"}
    assert set(deep_gemm.__all__) - known == newer
    for name in deep_gemm.__all__:
        assert hasattr(deep_gemm, name)
    assert [int(part) for part in deep_gemm.__version__.split(".")] >= [2, 8]


# ---- install() -----------------------------------------------------------------------------------


def test_install_and_uninstall() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("deep_gemm")
    module = compat.install()
    assert compat.install() is module
    assert compat.installed()
    import deep_gemm as found
    import deep_gemm.testing.numeric as numeric
    from deep_gemm.utils.math import per_token_cast_to_fp8

    assert found is module
    assert numeric is testing.numeric
    assert per_token_cast_to_fp8 is utils.math.per_token_cast_to_fp8
    compat.uninstall()
    compat.uninstall()
    assert not compat.installed()
    with pytest.raises(ImportError):
        importlib.import_module("deep_gemm.utils.layout")


def test_refuses_to_shadow_and_falls_through(tmp_path: Any, monkeypatch: Any) -> None:
    """An installed deep_gemm that has not been imported: with a relative import of its own."""
    package = tmp_path / "deep_gemm"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import only_theirs\nfp8_gemm_nt = 'theirs'\n")
    (package / "inner.py").write_text("def only_theirs():\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with refused("force: expected True, to shadow a deep_gemm that is installed, got .*deep_gemm"):
        compat.install()
    module = compat.install(force=True)
    assert "_sm120_ops_shadowed_deep_gemm" not in sys.modules
    assert module.fp8_gemm_nt is deep_gemm.fp8_gemm_nt
    assert module.only_theirs() == 7
    assert not hasattr(module, "nobodys")
    compat.uninstall()
    import deep_gemm as theirs

    assert theirs.fp8_gemm_nt == "theirs"
    for name in [n for n in sys.modules if n.split(".")[0] == "deep_gemm" or "shadowed" in n]:
        del sys.modules[name]


def test_shadows_an_imported_one_and_gives_it_back(monkeypatch: Any) -> None:
    theirs = types.ModuleType("deep_gemm")
    theirs.only_theirs = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", theirs)
    with refused("to shadow a deep_gemm"):
        compat.install()
    assert compat.install(force=True).only_theirs == 7
    compat.uninstall()
    assert sys.modules["deep_gemm"] is theirs


def test_a_broken_one_below_only_lacks_names(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "deep_gemm.py").write_text("raise RuntimeError('no nvcc')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = compat.install(force=True)
    assert not hasattr(module, "mega_mhc")


# ---- Settings ------------------------------------------------------------------------------------


def test_settings() -> None:
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(64)
    for name in ("mk", "m", "k"):
        assert getattr(deep_gemm, f"get_{name}_alignment_for_contiguous_layout")() == 64
    theoretical = deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout
    assert [theoretical(), theoretical(64), theoretical(65)] == [128, 64, 128]
    assert [theoretical(640, 10), theoretical(641, 10), theoretical(1, 8)] == [64, 128, 64]
    assert deep_gemm.get_num_sms() >= 1
    deep_gemm.set_num_sms(6)
    assert deep_gemm.get_num_sms() == 6
    assert deep_gemm.get_pdl() is False
    deep_gemm.set_pdl(True)
    assert deep_gemm.get_pdl() is True
    deep_gemm.set_tc_util(80)
    assert deep_gemm.get_tc_util() == 80
    for value in (2, (1, 2)):
        deep_gemm.set_block_size_multiple_of(value)
    deep_gemm.set_ignore_compile_dims(True)
    deep_gemm.use_deterministic_algorithms(True)
    deep_gemm.init("lib", "/usr/local/cuda")
    deep_gemm.shutdown()
    setters: tuple[Any, ...] = (
        deep_gemm.set_num_sms,
        deep_gemm.set_mk_alignment_for_contiguous_layout,
    )
    for function in setters:
        with refused("expected a positive number, got 0"):
            function(0)
        with refused("expected an int, got str", TypeError):
            function("7")


def test_compile_mode_runs_nothing() -> None:
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(4, 128), True)
    d = torch.full((4, 4), 7.0)
    deep_gemm.set_compile_mode(1)
    assert deep_gemm.get_compile_mode() == 1
    deep_gemm.fp8_gemm_nt(a, a, d, recipe=(1, 1, 128))
    assert (d == 7).all()


def test_mega_moe_says_that_it_is_not_there() -> None:
    for name, count in (
        ("SymmBuffer", 3),
        ("transform_weights_for_mega_moe", 2),
        ("fp8_fp4_mega_moe", 4),
    ):
        with refused(f"sm120_ops.deep_gemm.{name}: expected a GPU of the SM100", RuntimeError):
            getattr(deep_gemm, name)(*[None] * count)
    with refused("no mega MoE kernel", RuntimeError):
        deep_gemm.get_symm_buffer_for_mega_moe(None, 8, 1, 2, 4, 4)


# ---- Casts and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("k", [64, 256, 416])
def test_casts(device: torch.device, gran_k: int, k: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, k, device=device, dtype=BF16)
    data, sf = deep_gemm.per_token_cast_to_fp8(x, True, gran_k)
    groups = -(-k // gran_k)
    assert sf.shape == (37, groups)
    same, packed = sm120_ops.quantize(x, "mxfp8", gran_k)
    assert torch.equal(data.view(torch.uint8), same.view(torch.uint8))
    assert torch.equal(sf, sm120_ops.unpack_scales(packed, groups, FP32))
    assert calc_diff(deep_gemm.cast_back_from_fp8(data, sf, gran_k), x) < 1e-3
    data, sf = deep_gemm.per_token_cast_to_fp4(x, True, gran_k)
    assert data.dtype == torch.int8
    same, packed = sm120_ops.quantize(x, "mxfp4", gran_k)
    assert torch.equal(data.view(torch.uint8), same)
    assert torch.equal(sf, sm120_ops.unpack_scales(packed, groups, FP32))
    assert calc_diff(deep_gemm.cast_back_from_fp4(data, sf, gran_k), x) < 2e-2
    packed_data, words = deep_gemm.per_token_cast_to_fp4(x, True, gran_k, True)
    back = deep_gemm.cast_back_from_fp4(packed_data, words, gran_k, True)
    assert torch.equal(back, deep_gemm.cast_back_from_fp4(data, sf, gran_k))
    assert torch.equal(deep_gemm.unpack_ue8m0_from_int(words)[:, :groups], sf)


def test_casts_without_ue8m0(device: torch.device) -> None:
    x = torch.randn(256, 256, device=device)
    for cast in (
        deep_gemm.per_token_cast_to_fp8,
        deep_gemm.per_block_cast_to_fp8,
        deep_gemm.per_channel_cast_to_fp8,
    ):
        data, sf = cast(x, False)
        spread = sf.repeat_interleave(256 // sf.shape[0], 0).repeat_interleave(
            256 // sf.shape[1], 1
        )
        assert calc_diff(data.float() * spread, x) < 1e-3
        assert not torch.equal(deep_gemm.ceil_to_ue8m0(sf), sf)
        exact = deep_gemm.ceil_to_ue8m0(cast(x, True)[1])
        assert torch.equal(exact, cast(x, True)[1])
    x = torch.randn(4, 6, 8, device=device)
    data, sf = deep_gemm.per_custom_dims_cast_to_fp8(x, (0, 1), True)
    assert sf.shape == (4, 6)
    assert calc_diff(data.float() * sf[..., None], x) < 1e-3


def test_ceil_to_ue8m0() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 2.0**-126, 3e38, -0.75, 1e-40])
    expected = torch.tensor([1.0, 2.0, 2.0, 2.0**-126, 2.0**127, 1.0, 2.0**-126])
    assert torch.equal(deep_gemm.ceil_to_ue8m0(x), expected)
    assert deep_gemm.ceil_div(7, 4) == 2
    assert deep_gemm.align(x=7, y=4) == 8
    with refused("pack_ue8m0_to_int: x: expected float32 scales that are powers of two"):
        deep_gemm.pack_ue8m0_to_int(torch.tensor([1.0, 1.5, 2.0, 4.0]))
    with refused("a multiple of 4"):
        deep_gemm.pack_ue8m0_to_int(torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(37, 5), (64, 8), (3, 37, 5), (2, 64, 1)])
def test_layouts(device: torch.device, shape: tuple[int, ...]) -> None:
    sf = powers(shape, device)
    mn, groups = shape[-2:]
    aligned = deep_gemm.get_tma_aligned_size(mn, 4)
    assert aligned == -(-mn // 4) * 4
    major = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    assert torch.equal(major, sf)
    assert major.stride()[-2:] == (1, aligned)
    assert deep_gemm.get_mn_major_tma_aligned_tensor(major) is major
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    words = -(-groups // 4)
    assert packed.shape == (*shape[:-1], words)
    assert packed.stride() == (words * aligned, 1, aligned)[-len(shape) :]
    values = deep_gemm.unpack_ue8m0_from_int(packed)
    assert torch.equal(values[..., :groups], sf)
    forms: list[tuple[tuple[int, ...], dict[str, Any]]]
    forms = [((1, 32), {}), ((128, 1, 32), {"is_sfa": False})]
    for recipe, options in forms:
        if len(shape) == 3:
            options["num_groups"] = shape[0]
        out = deep_gemm.transform_sf_into_required_layout(sf, mn, 32 * groups, recipe, **options)
        assert torch.equal(out, packed)
        assert out.stride() == packed.stride()
        again = deep_gemm.transform_sf_into_required_layout(out, mn, 32 * groups, recipe, **options)
        assert again is out


@pytest.mark.parametrize("gran_mn", [5, 32, 64, 128])
@pytest.mark.parametrize("mn", [96, 200, 256])
def test_block_scales_are_spread(device: torch.device, gran_mn: int, mn: int) -> None:
    blocks = -(-mn // gran_mn)
    sf = powers((2, blocks, 3), device)
    out = deep_gemm.transform_sf_into_required_layout(sf, mn, 384, (1, gran_mn, 128), 2, False)
    values = deep_gemm.unpack_ue8m0_from_int(out)[..., :3]
    assert torch.equal(values, sf.repeat_interleave(gran_mn, 1)[:, :mn])
    flat = deep_gemm.transform_sf_into_required_layout(sf[1], mn, 384, (gran_mn, 128))
    assert torch.equal(flat, out[1])


def test_k_grouped_packing(device: torch.device) -> None:
    ks = [128, 0, 640, 384]
    sf = powers((sum(ks) // 128, 12), device)
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=device)
    pack = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    out = pack(sf, ks_tensor, ks, 128)
    assert out.shape == (1 + 0 + 2 + 1, 12)
    bytes_of = out.view(torch.uint8).view(4, 12, 4)
    wanted = (sf.view(torch.int32) >> 23).to(torch.uint8)
    assert torch.equal(bytes_of[0, :, 0], wanted[0])
    assert torch.equal(bytes_of[1], wanted[1:5].t())
    assert torch.equal(bytes_of[2, :, 0], wanted[5])
    assert torch.equal(bytes_of[3, :, :3], wanted[6:].t())
    with refused("expected 9 rows for ks"):
        pack(sf[1:], ks_tensor, ks, 128)


def test_layout_refusals(device: torch.device) -> None:
    transform = deep_gemm.transform_sf_into_required_layout
    sf = torch.ones(8, 2, device=device)
    name = "sm120_ops.deep_gemm.transform_sf_into_required_layout: "
    with refused(name + r"sf: expected float32 scales that are powers of two.*row 3, group 1"):
        bad = sf.clone()
        bad[3, 1] = 0.3
        transform(bad, 8, 256, (1, 128))
    with refused(name + r"sf: expected shape \[8, 3\] \(gran_mn 1, gran_k 128\), got \[8, 2\]"):
        transform(sf, 8, 384, (1, 128))
    with refused(name + "is_sfa: expected True or False with a recipe of three"):
        transform(sf, 8, 256, (1, 128, 128))
    with refused(name + "is_sfa: expected None with a recipe of two"):
        transform(sf, 8, 256, (1, 128), is_sfa=True)
    with refused(name + r"recipe: expected a positive gran_mn and gran_k of \[32, 128\]"):
        transform(sf, 8, 256, (1, 64))
    with refused(name + "sf: expected dtype", TypeError):
        transform(sf.half(), 8, 256, (1, 128))
    with refused(name + "sf: expected 3 dimensions"):
        transform(sf, 8, 256, (1, 128), 2)


def test_testing_helpers(device: torch.device, monkeypatch: Any) -> None:
    x = torch.randn(8, device=device)
    assert calc_diff(x, x) < 1e-15
    assert calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    assert testing.count_bytes(x, (x.double(), None, [x.half()])) == 8 * (4 + 8 + 2)
    testing.assert_bitwise_equal(x, x.clone())
    y = x.clone()
    y[5] += 1
    with pytest.raises(AssertionError, match="1 elements differ, first 5"):
        testing.assert_bitwise_equal(x, y)
    runs: list[int] = []
    testing.test_filter(lambda: True)(runs.append)(1)
    testing.test_filter(lambda: False)(runs.append)(2)
    assert runs == [1]
    monkeypatch.setenv("DG_TEST", "5")
    seen: list[str | None] = []

    testing.ignore_env("DG_TEST", lambda: True)(lambda: seen.append(os.environ.get("DG_TEST")))()
    assert (seen, os.environ["DG_TEST"]) == ([None], "5")


@pytest.mark.gpu
def test_bench_helpers() -> None:
    x = torch.randn(1024, 1024, device="cuda", dtype=BF16)
    assert 0 < testing.bench(lambda: x @ x, 1, 2) < 1
    w = deep_gemm.per_token_cast_to_fp8(x, True)
    d = torch.empty(1024, 1024, device="cuda", dtype=BF16)
    run = lambda: deep_gemm.fp8_gemm_nt(w, w, d, recipe=(1, 1, 128))  # noqa: E731
    seconds = testing.bench_kineto(
        run, "gemm", num_tests=3, suppress_kineto_output=True, with_multiple_kernels=True
    )
    assert 0 < seconds < 1
    assert testing.get_arch_major() in (9, 12)


def test_no_gradient_is_cut_silently() -> None:
    """What can require a gradient is refused with grad mode on, and taken with it off."""
    w = torch.randn(16, 64, dtype=BF16, requires_grad=True)
    x, d = torch.randn(8, 64, dtype=BF16), torch.empty(8, 16, dtype=BF16)
    fn = torch.randn(8, 64, requires_grad=True)
    q = torch.zeros(4, 8, 64).to(torch.float8_e4m3fn)
    keys = (torch.zeros(6, 64).to(torch.float8_e4m3fn), torch.ones(6))
    heads = torch.randn(4, 8, requires_grad=True)
    starts, ends = torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    calls: list[Any] = [
        lambda: deep_gemm.bf16_gemm_nt(x, w, d),
        lambda: deep_gemm.tf32_hc_prenorm_gemm(x, fn, torch.empty(8, 8), torch.empty(8)),
        lambda: deep_gemm.fp8_mqa_logits(q, keys, heads, starts, ends),
        lambda: deep_gemm.einsum("bmk,bnk->mn", x[None], w[None], d),
    ]
    for call in calls:
        with refused("expected a tensor that needs no gradient", RuntimeError):
            call()
        with torch.no_grad():
            call()


def test_stats() -> None:
    sm120_ops.stats(reset=True)
    problem = Problem(torch.device("cpu"), 4, 128, 128, (128, 128, False, False))
    for _ in range(3):
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d)
    assert sm120_ops.stats(reset=True)["calls"] == {"deep_gemm.fp8_fp4_gemm_nt": 3}
    assert sm120_ops.stats()["calls"] == {}

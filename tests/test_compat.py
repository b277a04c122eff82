"""DeepGEMM's API: names and signatures, and each name called in DeepGEMM's own conventions.

References are products of the unquantised inputs, as in DeepGEMM's tests, and MAX_DIFF are its
tolerances for calc_diff(), which so hold the error of quantisation too.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import deep_gemm_api
import pytest
import torch

import sm120_ops
from sm120_ops import compat
from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm import testing, utils
from sm120_ops.compat.deep_gemm.testing import calc_diff

BF16, FP32 = torch.bfloat16, torch.float32
Operand = tuple[torch.Tensor, torch.Tensor]
Recipe = tuple[int, int]

# (gran_k of A, of B, A is FP4, B is FP4): the tolerance, and the recipes that are passed.
CONFIGS = {
    (128, 128, False, False): 0.001,
    (32, 32, False, False): 0.001,
    (32, 32, True, True): 0.02,
    (128, 32, False, True): 0.01,
    (32, 128, True, False): 0.01,
}
SCALE_FORMS = ("float32", "packed", "bytes")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Settings are per process."""
    yield
    compat.uninstall()
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    deep_gemm.set_compile_mode(0)
    deep_gemm.runtime._settings.num_sms = None


def refused(requirement: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=requirement)


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
    deep_gemm.set_pdl(False)
    deep_gemm.set_tc_util(80)
    assert deep_gemm.get_tc_util() == 80
    deep_gemm.set_tc_util(100)
    for value in (2, (1, 2)):
        deep_gemm.set_block_size_multiple_of(value)
    deep_gemm.set_ignore_compile_dims(True)
    deep_gemm.use_deterministic_algorithms(True)
    deep_gemm.init("lib", "/usr/local/cuda")
    deep_gemm.shutdown()
    for function in (
        deep_gemm.set_num_sms,
        deep_gemm.set_mk_alignment_for_contiguous_layout,
    ):
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


def powers(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(-20, 20, shape, device=device).float().exp2()


def as_form(sf: torch.Tensor, form: str, mn: int, recipe: Recipe) -> torch.Tensor:
    """float32 scales in one of the accepted forms."""
    if form == "float32":
        return sf
    if form == "bytes":
        return (sf.view(torch.int32) >> 23).to(torch.uint8)
    k = sf.shape[-1] * recipe[1]
    groups = sf.shape[0] if sf.dim() == 3 else None
    return deep_gemm.transform_sf_into_required_layout(sf, mn, k, recipe, groups)


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
    for recipe, options in (((1, 32), {}), ((128, 1, 32), {"is_sfa": False})):
        if len(shape) == 3:
            options["num_groups"] = shape[0]
        out = deep_gemm.transform_sf_into_required_layout(sf, mn, 32 * groups, recipe, **options)
        assert torch.equal(out, packed)
        assert out.stride() == packed.stride()
        again = deep_gemm.transform_sf_into_required_layout(out, mn, 32 * groups, recipe, **options)
        assert again is out


@pytest.mark.parametrize("gran_mn", [32, 128])
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
    with refused(name + r"recipe: expected gran_mn of \[1, 32, 128\] and gran_k of \[32, 128\]"):
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
    runs = []
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


# ---- Dense ---------------------------------------------------------------------------------------


def quantised(x: torch.Tensor, gran_k: int, fp4: bool, block: bool = False) -> Operand:
    if fp4:
        return deep_gemm.per_token_cast_to_fp4(x, True, gran_k)
    cast = deep_gemm.per_block_cast_to_fp8 if block else deep_gemm.per_token_cast_to_fp8
    return cast(x, True, gran_k)


class Problem:
    """Random A, B (and C) with their quantised forms, as DeepGEMM's tests make them."""

    def __init__(
        self,
        device: torch.device,
        m: int,
        n: int,
        k: int,
        config: tuple[int, int, bool, bool],
        form: str = "float32",
        out_dtype: torch.dtype = BF16,
        accumulate: bool = False,
    ) -> None:
        generator = torch.Generator(device).manual_seed(m + n + k)
        randn = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
        x, w = randn(m, k).bfloat16(), randn(n, k).bfloat16()
        gran_a, gran_b, fp4_a, fp4_b = config
        block = not fp4_a and not fp4_b and not accumulate
        a, b = quantised(x, gran_a, fp4_a), quantised(w, gran_b, fp4_b, block)
        recipe_a, recipe_b = (1, gran_a), (gran_b if block else 1, gran_b)
        self.a = a[0], as_form(a[1], form, m, recipe_a)
        self.b = b[0], as_form(b[1], form, n, recipe_b)
        self.c = randn(m, n).mul(32).to(out_dtype) if accumulate else None
        legacy = config == (128, 128, False, False) and not accumulate
        self.options: dict[str, Any] = (
            {} if legacy else {"recipe_a": recipe_a, "recipe_b": recipe_b}
        )
        self.d = torch.full((m, n), math.nan, device=device, dtype=out_dtype)
        self.wanted = x.float() @ w.float().t() + (0 if self.c is None else self.c.float())
        self.limit = CONFIGS[config]

    def check(self) -> None:
        assert calc_diff(self.d, self.wanted) < self.limit


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", SCALE_FORMS)
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_dense(
    device: torch.device,
    config: tuple[int, int, bool, bool],
    form: str,
    out_dtype: torch.dtype,
    accumulate: bool,
) -> None:
    for m, n, k in [(1, 256, 512), (96, 128, 384), (130, 264, 256)]:
        problem = Problem(device, m, n, k, config, form, out_dtype, accumulate)
        deep_gemm.fp8_fp4_gemm_nt(problem.a, problem.b, problem.d, problem.c, **problem.options)
        problem.check()
        if problem.c is not None:  # in place, as D is C
            out = problem.c.clone()
            deep_gemm.fp8_fp4_gemm_nt(problem.a, problem.b, out, out, **problem.options)
            assert torch.equal(out, problem.d)


def transposed(operand: Operand) -> Operand:
    data, sf = operand
    if data.dtype == torch.int8:
        return deep_gemm.transpose_packed_fp4(data), sf.t()
    return data.t().contiguous(), sf.t()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("form", SCALE_FORMS)
def test_dense_layouts(
    device: torch.device, config: tuple[int, int, bool, bool], layout: str, form: str
) -> None:
    problem = Problem(device, 96, 160, 256, config, form)
    a = transposed(problem.a) if layout[0] == "t" else problem.a
    b = transposed(problem.b) if layout[1] == "n" else problem.b
    for name in (f"fp8_fp4_gemm_{layout}", f"fp8_gemm_{layout}"):
        problem.d.fill_(math.nan)
        getattr(deep_gemm, name)(a, b, problem.d, **problem.options)
        problem.check()


@pytest.mark.parametrize("config", CONFIGS)
def test_dense_mn_major_operands(device: torch.device, config: tuple[int, int, bool, bool]) -> None:
    """`nt` with data that is contiguous along the rows."""
    problem = Problem(device, 96, 160, 256, config)
    (a, sfa), (b, sfb) = problem.a, problem.b
    a, b = (transposed((data, data))[0].t() for data in (a, b))
    deep_gemm.fp8_gemm_nt((a, sfa), (b, sfb), problem.d, **problem.options)
    problem.check()


def test_dense_what_deep_gemm_gets_wrong(device: torch.device) -> None:
    """C with few tiles, narrow N, a strided D, empty sizes, scales that are no powers of two."""
    config = (128, 128, False, False)
    for m, n, k in [(8, 8, 4096), (3, 24, 1024), (64, 16, 256), (1, 1, 128), (5, 33, 128)]:
        problem = Problem(device, m, n, k, config, accumulate=True)
        wide = torch.full((m, n + 13), 7.0, device=device, dtype=BF16)
        deep_gemm.fp8_gemm_nt(
            problem.a, problem.b, wide[:, 5 : 5 + n], problem.c, **problem.options
        )
        problem.d = wide[:, 5 : 5 + n]
        problem.check()
        assert (wide[:, :5] == 7).all()
        assert (wide[:, 5 + n :] == 7).all()
    for m, n in [(0, 128), (128, 0)]:
        problem = Problem(device, m, n, 128, config)
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d)
    problem = Problem(device, 8, 128, 128, config)
    bad = problem.a[0], problem.a[1] * 1.5
    with refused("sm120_ops.deep_gemm.fp8_fp4_gemm_nt: sfa: expected float32 scales that are pow"):
        deep_gemm.fp8_gemm_nt(bad, problem.b, problem.d)
    with refused("sm120_ops.deep_gemm.fp8_fp4_gemm_nt: alpha: expected None"):
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, alpha=2.0)
    with refused("expected recipe, or recipe_a and recipe_b"):
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, recipe_a=(1, 128))
    with refused("expected recipe, or recipe_a and recipe_b"):
        both = {"recipe_a": (1, 128), "recipe_b": (128, 128)}
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, recipe=(1, 128, 128), **both)
    a = quantised(torch.randn(8, 128, device=device), 32, False)
    with refused(r"sfb: expected shape \[4, 4\] \(gran_mn 32, gran_k 32\), got \[1, 1\]"):
        deep_gemm.fp8_gemm_nt(a, problem.b, problem.d, recipe=(1, 32, 32))


def test_dense_recipe_of_three(device: torch.device) -> None:
    """(1, 32, 32) as SGLang has it for 32 x 32 blocks, and (1, 1, 128)."""
    x, w = (torch.randn(s, 256, device=device) for s in (40, 96))
    d = torch.empty(40, 96, device=device, dtype=BF16)
    for recipe, b in (
        ((1, 32, 32), deep_gemm.per_block_cast_to_fp8(w, True, 32)),
        ((1, 1, 128), deep_gemm.per_token_cast_to_fp8(w, True, 128)),
        ((1, 1, 32), deep_gemm.per_token_cast_to_fp8(w, True, 32)),
    ):
        a = deep_gemm.per_token_cast_to_fp8(x, True, recipe[2])
        for form in SCALE_FORMS:
            for_a, for_b = (1, recipe[2]), (recipe[1], recipe[2])
            deep_gemm.fp8_gemm_nt(
                (a[0], as_form(a[1], form, 40, for_a)),
                (b[0], as_form(b[1], form, 96, for_b)),
                d,
                recipe=recipe,
                compiled_dims="",
                disable_ue8m0_cast=form == "packed",
            )
            assert calc_diff(d, x @ w.t()) < 1e-3


@pytest.mark.parametrize("splits", [(128, 64, 128), (64, 32, 0), (0, 8, 16), (3, 5, 1)])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("form", SCALE_FORMS)
def test_skip_head_mid(
    device: torch.device, splits: tuple[int, int, int], out_dtype: torch.dtype, form: str
) -> None:
    left, mid, right = splits
    heads, k = 4, 2048
    problem = Problem(device, 24, heads * (left + right), k, (128, 128, False, False), form)
    d = torch.full((24, heads * sum(splits)), 7.0, device=device, dtype=out_dtype)
    deep_gemm.fp8_gemm_nt_skip_head_mid(problem.a, problem.b, d, splits)
    by_head = d.view(24, heads, sum(splits))
    assert (by_head[..., left : left + mid] == 7).all()
    problem.d = torch.cat((by_head[..., :left], by_head[..., left + mid :]), 2).flatten(1)
    problem.check()


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_cublaslt(
    device: torch.device, layout: str, out_dtype: torch.dtype, accumulate: bool
) -> None:
    x, w = (
        torch.randn(40, 256, device=device).to(BF16),
        torch.randn(64, 256, device=device).to(BF16),
    )
    a = x.t().contiguous() if layout[0] == "t" else x
    b = w.t().contiguous() if layout[1] == "n" else w
    c = torch.randn(40, 64, device=device).to(out_dtype) if accumulate else None
    d = torch.empty(40, 64, device=device, dtype=out_dtype)
    getattr(deep_gemm, f"cublaslt_gemm_{layout}")(a, b, d, c)
    assert calc_diff(d, x.float() @ w.float().t() + (0 if c is None else c.float())) < 1e-5


# ---- Under torch.compile; what a call costs ------------------------------------------------------


def test_compiles_without_recompiling(device: torch.device) -> None:
    w = Problem(device, 1, 96, 256, (128, 128, False, False), "packed").b

    def step(x: torch.Tensor) -> torch.Tensor:
        data, sf = sm120_ops.quantize(x, "mxfp8", 128)
        d = torch.empty(x.shape[0], 96, device=x.device, dtype=BF16)
        deep_gemm.fp8_gemm_nt((data, sf), w, d)
        return d * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 3, 64, 17):
            x = torch.randn(rows, 256, device=device)
            assert torch.equal(compiled(x), step(x))


def test_stats() -> None:
    sm120_ops.stats(reset=True)
    problem = Problem(torch.device("cpu"), 4, 128, 128, (128, 128, False, False))
    for _ in range(3):
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d)
    assert sm120_ops.stats(reset=True)["calls"] == {"deep_gemm.fp8_fp4_gemm_nt": 3}
    assert sm120_ops.stats()["calls"] == {}

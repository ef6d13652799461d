"""What equality of floats means on the platform that runs the tests: the one place that knows.

On CPU tolerances are those that a test states, and programs that do the same work in other portions give equal bits. A
GPU takes sums in the order of the kernels that its compiler chose for each program. None was there to measure how far
that goes, so the factor below is a guess: twenty times float32 rounding, a fiftieth of what TF32 would do.
"""

from collections.abc import Mapping

# Of a GPU; for the whole process, before it looks for devices.
ENVIRONMENT = {
    # Sums without atomics, so that a program gives the same bits twice; products by cuBLAS, which heeds the next line.
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false",
    # Runs train at the precision "default", which would be TF32: ten bits.
    "NVIDIA_TF32_OVERRIDE": "0",
}
WIDER = 20

# Of programs that differ (rounds cut elsewhere, several in one dispatch, something beside the training or not) or of
# bits that a CPU saved.
EQUAL_BITS_ON_CPU_ALONE = {
    "test_a_chunk_that_was_cut_short_goes_on",
    "test_a_comparison_goes_on_inside_the_run_that_was_cut",
    "test_a_constant_plan_is_no_plan_to_the_bit",
    "test_a_member_is_its_run",
    "test_a_record_that_was_changed_falls_back_or_is_refused",
    "test_a_residual_network_cut_anywhere_equals_an_uncut_one",
    "test_a_restored_state_goes_on_as_if_nothing_had_happened",
    "test_a_run_cut_anywhere_equals_an_uncut_one",
    "test_a_run_on_a_share_equals_one_on_copies_bit_for_bit",
    "test_a_run_resumes_everywhere",
    "test_a_run_that_an_earlier_version_saved",
    "test_a_run_that_skips_steps_is_the_same_however_it_is_cut",
    "test_a_task_with_a_loss_of_its_own_resumes_everywhere",
    "test_an_interrupted_run_goes_on_to_the_same_end",
    "test_chunks_share_their_programs",
    "test_exact_settings_change_no_bit_of_what_a_run_reports",
    "test_it_goes_on_exactly_at_a_boundary_from_its_files",
    "test_keeping_everything_is_ordinary_training_exactly",
    "test_measuring_leaves_the_training_as_it_was",
    "test_measuring_leaves_the_training_of_a_residual_network_as_it_was",
    "test_short_rounds_in_one_dispatch_equal_one_dispatch_each",
    "test_rows_of_chunks_are_those_of_runs_alone",
    "test_the_three_ways",
    "test_what_was_cut_short_goes_on_to_the_same_bits",
}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to this environment: `ENVIRONMENT` where a GPU is asked for by name, else nothing."""
    if environment.get("JAX_PLATFORMS", "").split(",")[0] not in ("cuda", "gpu"):
        return {}
    # What was asked for comes last: it wins.
    flags = f"{ENVIRONMENT['XLA_FLAGS']} {environment.get('XLA_FLAGS', '')}".strip()
    return {**ENVIRONMENT, "XLA_FLAGS": flags}


def platform() -> str:
    import jax  # it reads the environment

    return jax.default_backend()


def near(*, on: str | None = None, **tolerances: float) -> dict[str, float]:
    """`rtol` and `atol` of a comparison in float32, given those for CPU; `on` is the platform that runs the tests."""
    factor = 1 if (on or platform()) == "cpu" else WIDER
    return {name: factor * tolerance for name, tolerance in tolerances.items()}


def not_here(name: str, on: str | None = None) -> str | None:
    """Why the test of this name does not hold on this platform; None where it does."""
    on = on or platform()
    if on == "cpu" or name not in EQUAL_BITS_ON_CPU_ALONE:
        return None
    return f"equal bits are promised on CPU, not on {on} (docs/reproducibility.md)"

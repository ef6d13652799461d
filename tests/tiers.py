"""Which tests wait for the second tier (`scripts/test.sh --ci`), and how many of their cases stay in the first.

Measured one by one with an empty compilation cache: these functions took half of the suite's time, nearly all of it in
compiling a program for each case. The cases that stay are the first ones; a test with a mark of its own needs no line
here, and what fits in neither tier is marked `slow` where it stands.
"""

CASES_KEPT = {
    # training: each case compiles a run of its own
    "test_measuring_leaves_the_training_as_it_was": 3,
    "test_every_two_axes_work_together": 1,
    "test_a_measurement_is_the_gram_of_the_very_batch_that_is_trained": 1,
    "test_positions_and_what_each_stands_for": 2,
    "test_rates_decay_momentum_and_seed_compile_nothing": 0,
    "test_optax_losses_are_the_losses_measured": 0,
    "test_a_network_that_no_rule_covers_is_refused_before_anything_is_written": 0,
    "test_evaluation_is_exact_whatever_its_batch": 2,
    "test_the_final_state_is_measured_at_the_rate_of_its_last_step": 0,
    "test_the_final_state_in_float64": 0,
    "test_spectra_that_are_not_finite": 1,
    "test_a_run_resumes_everywhere": 3,
    "test_the_check_notices_what_is_forgotten": 1,
    "test_an_interrupted_run_goes_on_to_the_same_end": 0,
    "test_a_comparison_goes_on_inside_the_run_that_was_cut": 0,
    "test_another_network_of_the_same_shapes_is_refused": 0,
    "test_what_is_equal_to_rounding_alone_is_named": 0,
    "test_every_file_of_a_checkpoint_damaged_in_turn": 1,
    # engine and choose: trimmed steps by every path
    "test_history_under_trimming": 1,
    "test_both_paths_train_alike": 0,
    "test_a_step_equals_a_loop_over_the_kept_samples": 4,
    "test_random_control_takes_the_path_that_keeps_dropped_samples_out": 0,
    "test_residuals_that_merge_the_batch_with_later_axes": 0,
    "test_a_second_forward_pass_must_save_memory": 0,
    "test_networks_that_need_not_differentiate_the_dropped": 2,
    "test_one_sample_kept_of_few": 0,
    "test_visits_are_counted_sample_by_sample": 2,
    "test_a_run_cut_anywhere_equals_an_uncut_one": 3,
    "test_exact_settings_change_no_bit_of_what_a_run_reports": 0,
    "test_rounding_settings_stay_within_rounding": 1,
    # fisher, models and cli: whole networks, traced or compiled
    "test_what_is_left_out_is_noticed": 1,
    "test_a_whole_layer_left_out_is_noticed": 0,
    "test_what_layers_cannot_do_is_refused_and_the_definition_is_right": 3,
    "test_compare_methods_of_trimming": 0,
    "test_a_layer_hidden_by_a_transformation_is_never_left_out_in_silence": 1,
    "test_a_bias_before_batch_norm_has_rows_that_are_rounding_alone": 0,
    "test_mixed_precision_accumulates_in_float32": 0,
    "test_convolutions": 0,
    "test_from_torch_reads_the_size_of_the_images_from_the_weights": 0,
    "test_last_scales_of_branches_start_at_zero_in_timm_resnets_alone": 0,
    "test_by_layers_equals_the_definition": 1,
    "test_models_lists_sizes_beside_the_published_ones": 0,
    "test_measures_in_a_comparison_stand_in_its_table": 0,
    "test_hard_samples_draw_the_hardest_too": 0,
    "test_a_name_stands_for_a_network_or_for_what_makes_one": 1,
    "test_of_the_command_line": 36,
    "test_of_files_and_folders": 16,
}

"""Rows of the denoiser are counted for each arm, the window in each of its places once."""


def test_rows_of_the_three_arms(micro_pipeline_folder, tmp_path):
    from shared_prefix import Arguments, measure

    sizes = {"samples": 4, "samples_per_prompt": 2, "num_inference_steps": 3, "noise_window": 1}
    costs = measure(Arguments(model=str(micro_pipeline_folder), **sizes), tmp_path)
    samples = 4 * 3
    rows = {arm: (cost.sampled_rows / samples, cost.trained_rows / samples) for arm, cost in costs.items()}
    # The window is at steps 0, 1 and 2: of 2 samples, 1 to 3 of 3 calls are shared.
    assert rows == {"every step": (3, 3), "window": (3, 1), "window, shared prefix": (2, 1)}
    assert all(cost.seconds > 0 and cost.iterations == 3 for cost in costs.values())

"""The least time of a sample."""


def test_guidance_doubles_the_calls_of_a_step(figures_of):
    import roofline

    plain, guided = (
        figures_of(roofline, ["--device=cpu", "--threads=1", f"--guidance-scale={scale}"]) for scale in (1, 5)
    )
    assert plain["update_operations"] == 5 * plain["training_operations"]
    assert guided["update_operations"] == 2 * plain["update_operations"]
    assert plain["training_operations"] > 1.5 * plain["forward_operations"]
    assert guided["sample_operations"] - plain["sample_operations"] == 10 * plain["forward_operations"]
    assert plain["least_sample_seconds"] > 0
    assert plain["output_bytes_per_row"] > 4 * 4 * 16 * 16

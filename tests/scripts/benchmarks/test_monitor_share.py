"""The share of the monitors is measured: every part takes time, and the monitors are a part of the evaluation."""


def test_monitors_are_a_part_of_the_evaluation(micro_pipeline_folder, tmp_path):
    from monitor_share import Arguments, measure

    arguments = Arguments(
        model=str(micro_pipeline_folder), samples=4, num_inference_steps=2, eval_samples=4, iterations=1
    )
    seconds = measure(arguments, tmp_path)
    assert 0 < seconds["monitors"] < seconds["evaluation"]
    assert seconds["iteration"] > 0

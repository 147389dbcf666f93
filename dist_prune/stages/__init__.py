"""The stages of a run, one file each. They run in this order (``dist_prune/pipeline/stage_graph.py``).

    train               -> dense.safetensors
    compare_criteria    dense -> criteria.json, criteria.safetensors             (only with ``score.compare``)
    score               dense, or the previous round's finetuned -> scores.safetensors    (each round)
    select              scores -> plan.json                                               (each round)
    prune               the network that was scored, scores, plan -> pruned.safetensors   (each round)
    finetune            dense, pruned, plan -> finetuned.safetensors             (between rounds, and after the last)
    evaluate            dense, pruned, finetuned, plan -> metrics.json, answers.safetensors
    information_curves  dense, scores -> curves.csv
    export              finetuned, plan, metrics -> export/bundle.json, export/model.safetensors
    report              plan, metrics, answers, curves, ledger -> report.json, report.html

``run(context)`` of each file is the stage. ``calibration``, ``latency_target``, ``report_images`` and
``training_setup`` are parts of stages and are no stages themselves.
"""

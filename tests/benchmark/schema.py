"""What SAEBench 0.6.0 asks of a result file of sparse probing (sae_bench/evals/base_eval_output.py), as a JSON schema."""

NUMBER, TEXT = {"type": ["number", "null"]}, {"type": ["string", "null"]}
METRICS = {"type": "object", "additionalProperties": NUMBER}
BY_K = {"type": "object", "patternProperties": {r"^\d+$": METRICS}, "additionalProperties": False}
TOP = {f"sae_top_{k}_test_{metric}" for k in (1, 2, 5, 10, 20, 50, 100) for metric in ("accuracy", "auc", "f1")}
LLM = {f"llm_test_{metric}" for metric in ("accuracy", "auc", "f1")}
DETAIL = {
    "type": "object",
    "required": ["dataset_name"],
    "properties": {"dataset_name": {"type": "string"}, "sae_metrics_by_k": BY_K, **dict.fromkeys(LLM | TOP, NUMBER)},
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "required": [
        *("eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics"),
        *("eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version"),
        "sae_cfg_dict",
    ],
    "properties": {
        "eval_type_id": {"type": "string"},
        "eval_config": {
            "type": "object",
            "properties": {
                "random_seed": {"type": "integer"},
                "dataset_names": {"type": "array", "items": {"type": "string"}},
                "probe_train_set_size": {"type": "integer"},
                "probe_test_set_size": {"type": "integer"},
                "k_values": {"type": "array", "items": {"type": "integer"}},
                "model_name": {"type": "string"},
            },
        },
        "eval_id": {"type": "string"},
        "datetime_epoch_millis": {"type": "integer", "minimum": 0, "maximum": 9_999_999_999_999},
        "eval_result_metrics": {
            "type": "object",
            "required": ["llm", "sae"],
            "properties": {
                "llm": {"type": "object", "properties": dict.fromkeys(LLM, NUMBER), "additionalProperties": False},
                "sae": {"type": "object", "properties": dict.fromkeys(TOP, NUMBER), "additionalProperties": False},
            },
            "additionalProperties": False,
        },
        "eval_result_details": {"type": "array", "items": DETAIL},
        "sae_metrics_by_k": BY_K,
        "sae_bench_commit_hash": {"type": "string"},
        "sae_lens_id": TEXT,
        "sae_lens_release_id": TEXT,
        "sae_lens_version": TEXT,
        "sae_cfg_dict": {"type": ["object", "null"]},
        "eval_result_unstructured": {},
    },
    "additionalProperties": False,
}

"""The model for lm-eval: importing this module registers `nemo_upcycle`.

`python -m nemo_upcycle.evaluation.lm run --model nemo_upcycle --model_args pretrained=DIR …` is
lm-eval's own command line with this model. `nemo-upcycle evaluate` is shorter and equivalent.
"""

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.checks import open_tokenizer
from nemo_upcycle.evaluation.opening import open_model


@register_model("nemo_upcycle")
class NemoUpcycleLM(HFLM):
    """Any checkpoint on any number of ranks: lm-eval's own model class, over `open_model`.

    Requests, request order and truncation are lm-eval's. All ranks handle all requests and split
    each batch.

    Args:
        pretrained: A checkpoint in NeMo 2's, Megatron-LM's or Hugging Face's format.
        tensor_model_parallel_size: TP.
        pipeline_model_parallel_size: PP.
        expert_model_parallel_size: EP.
        expert_tensor_parallel_size: Expert-TP.
        dtype: `float32`, `bfloat16` or `float16`; None means the checkpoint's.
        tokenizer: Directory of the tokenizer; None means the checkpoint's.
        options: Options of `HFLM`: batch_size, max_length, add_bos_token, prefix_token_id, …
    """

    def __init__(
        self,
        pretrained: str,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        expert_tensor_parallel_size: int = 1,
        dtype: str | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> None:
        folding = ParallelFolding.of(
            tp=tensor_model_parallel_size,
            pp=pipeline_model_parallel_size,
            ep=expert_model_parallel_size,
            etp=expert_tensor_parallel_size,
        )
        self.source = str(pretrained)
        options.pop("device", None)  # each rank has its own device
        super().__init__(
            pretrained=open_model(pretrained, folding, None if dtype == "auto" else dtype),
            backend="causal",
            tokenizer=open_tokenizer(tokenizer or pretrained),
            **options,
        )

    def _loglikelihood_tokens(
        self, requests: list[Any], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Compute log-likelihoods; replace an assertion of lm-eval by an error message.

        lm-eval truncates the context of a scored text, never the text itself.

        Raises:
            UpcyclingError: A text to score is longer than a row.
        """
        longest = max((len(text) for _, _, text in requests), default=0)
        if longest > self.max_length:
            raise UpcyclingError(
                f"A text to score has {longest} tokens, and a row {self.max_length}: expected a "
                "longer --max-length, a model of a longer context, or other questions."
            )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """Return model information that lm-eval stores with the results."""
        return {
            "model_source": self.source,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
        }


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

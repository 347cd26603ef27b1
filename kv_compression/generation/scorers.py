"""The models that continuations are scored with: a preset's, or those that the user names."""

from typing import NamedTuple

from kv_compression.data import embedded
from kv_compression.settings import EMBEDDED

# How texts become scores. Scores of another convention are computed again, and compared with no others.
CONVENTION = "stripped texts, Unicode words"


class ScorerModels(NamedTuple):
    """The models that score continuations; a `layer` of None is bert-score's choice for the encoder."""

    bertscore: str
    layer: int | None
    fluency: str

    def record(self) -> dict:
        """The models and the convention, as scores.json holds them."""
        models = {"bertscore_model": self.bertscore, "bertscore_layer": self.layer, "fluency_model": self.fluency}
        return models | {"convention": CONVENTION}


SCORERS = {
    "paper": ScorerModels("roberta-large", None, "EleutherAI/pythia-1b"),
    "embedded": ScorerModels(EMBEDDED, 6, EMBEDDED),
}


def scorers(preset: str, bertscore: str | None, fluency: str | None, layer: int | None = None) -> ScorerModels:
    """A preset's scorers, with the models and the encoder's `layer` replaced by those that are given."""
    chosen = SCORERS.get(preset, SCORERS["embedded"])
    if bertscore:
        chosen = chosen._replace(bertscore=bertscore, layer=None)
    if layer is not None:
        chosen = chosen._replace(layer=layer)
    return chosen._replace(fluency=fluency) if fluency else chosen


def load_scorers(models: ScorerModels) -> tuple:
    """Load the models as `scoring.BertScorer` and `scoring.Fluency` on this process's device. RunError if it fails."""
    from kv_compression.generation import scoring
    from kv_compression.io import processes

    device = processes.state().device
    encoder = embedded.embedded_encoder() if models.bertscore == EMBEDDED else models.bertscore
    language_model = embedded.embedded_model() if models.fluency == EMBEDDED else models.fluency
    return scoring.BertScorer(encoder, models.layer, device), scoring.Fluency(language_model, device)

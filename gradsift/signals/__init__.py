"""What methods read besides gradients: one module per signal, named in the SIGNALS table."""

from __future__ import annotations

SIGNALS: dict[str, str] = {
    "rows": "gradient rows, one per pool row and checkpoint (gradsift.gradients.passes)",
    "influence": "score of every pool row on every target row (gradsift.signals.influence)",
    "embeddings": "unit position-weighted mean of the base model's last hidden states (gradsift.signals.embeddings)",
    "difficulty": "minus the weight a score net learns to give a row (gradsift.signals.difficulty)",
    "features": "numbers that stand in the pool's own rows (gradsift.signals.features)",
    "ifd": "perplexity of the answer after its prompt over that without (gradsift.signals.ifd)",
    "ngrams": "log importance weight of a row's words toward the target (gradsift.signals.ngrams)",
    "loss": "mean loss of the answer under the base model (gradsift.model.losses)",
}

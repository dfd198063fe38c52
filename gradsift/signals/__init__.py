"""What methods read besides gradients: one module per signal, named in the SIGNALS table."""

from __future__ import annotations

SIGNALS: dict[str, str] = {
    "rows": "gradient rows, one per pool row and checkpoint (gradsift.gradients)",
    "influence": "score of every pool row on every target row (gradsift.influence)",
    "embeddings": "unit position-weighted mean of the base model's last hidden states (gradsift.signals.embeddings)",
    "loss": "mean loss of the answer under the base model (gradsift.signals.loss)",
}

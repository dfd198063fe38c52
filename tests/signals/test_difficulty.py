"""The score net of Self-Filter: T5.3 to T5.5, and its gradient against one whole backward pass."""

from __future__ import annotations

import torch

from gradsift.model.losses import token_nats
from gradsift.signals.difficulty import learned_difficulty, train_score_net, weighted_loss, weights
from tests.model.small_models import llama

ROWS = [
    {"input_ids": [3, 5, 7, 9, 11], "labels": [-100, -100, 7, 9, 11]},
    {"input_ids": [4, 6, 8], "labels": [-100, 6, 8]},
    {"input_ids": [5, 7, 9, 2], "labels": [-100, -100, -100, 2]},
]


def test_a_batch_of_one_teaches_the_net_nothing() -> None:
    net = torch.randn(4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    weighted_loss(torch.ones(1, 4) @ net, torch.tensor([7.0]), torch.tensor([3])).backward()
    assert net.grad is not None and net.grad.abs().max() == 0


def test_equal_scores_give_ordinary_cross_entropy() -> None:
    totals, tokens = torch.tensor([3.0, 8.0, 1.0]), torch.tensor([2, 5, 1])
    scores = torch.full((3,), 2.5)
    assert weights(scores).tolist() == [1, 1, 1]
    assert float(weighted_loss(scores, totals, tokens)) == float(totals.sum() / 8)


def test_one_step_lowers_the_score_of_the_row_of_higher_loss() -> None:
    features, net = torch.eye(2), torch.zeros(2, requires_grad=True)
    weighted_loss(features @ net, torch.tensor([6.0, 2.0]), torch.tensor([4, 4])).backward()
    assert net.grad is not None
    after = features @ (net.detach() - 0.1 * net.grad)
    assert after[0] < 0 < after[1]
    # d loss / d s_1 = rho_1 (1 - rho_1 / 2) l_1 / T - rho_1 rho_2 / 2 l_2 / T = (6 - 2) / 2 / 8
    assert torch.allclose(net.grad, torch.tensor([0.25, -0.25]))


def test_losses_of_tokens_are_those_of_one_row_at_a_time_with_every_logit() -> None:
    model = llama()
    with torch.no_grad():
        nats, owner = token_nats(model, ROWS)
        for i, row in enumerate(ROWS):
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            alone = torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], ignore_index=-100, reduction="none"
            )
            torch.testing.assert_close(
                nats[owner == i], alone[labels[0, 1:] != -100], atol=1e-5, rtol=1e-5
            )
    assert owner.tolist() == [0, 0, 0, 1, 1, 2]


def test_micro_batches_leave_net_and_model_what_one_batch_makes_of_them() -> None:
    features = torch.nn.functional.normalize(
        torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), dim=1
    )

    def train(steps: list[list[list[int]]]) -> torch.Tensor:
        return train_score_net(llama(), ROWS, features, steps, lr=1e-2)

    whole = train([[[0, 1, 2]], [[2, 0, 1]]])
    assert torch.allclose(whole, train([[[0], [1, 2]], [[2], [0], [1]]]), atol=1e-5)
    assert whole.abs().max() > 0


def test_rows_that_cannot_be_learned_become_difficult() -> None:
    """Two kinds of rows with features of their own; the answer of one kind follows from its
    question, of the other from nothing.
    """
    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(20, 60, (32, 2), generator=generator).tolist()
    rows = [
        (
            {"input_ids": [3, 4, 8, 8], "labels": [-100, -100, 8, 8]}
            if i % 2
            else {"input_ids": [5, 6, *d], "labels": [-100, -100, *d]}
        )
        for i, d in enumerate(draws)
    ]
    features = torch.eye(2)[[i % 2 for i in range(32)]]
    net = train_score_net(
        llama(),
        rows,
        features,
        [[list(range(i, i + 8))] for i in (0, 8, 16, 24) for _ in range(4)],
        lr=3e-3,
    )
    hard, easy = learned_difficulty(net, torch.eye(2)).tolist()
    assert hard > 0 > easy

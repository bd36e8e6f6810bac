"""Tables of what chats.py measures."""

from __future__ import annotations

from typing import Any

from measure import records


def trained_of(row: dict[str, Any]) -> str:
    """What of the weights is trained."""
    return f"LoRA {row['rank']}" if row["rank"] else "all weights"


def table(rows: list[dict[str, Any]]) -> str:
    """Losses, answers and memory."""
    before, *runs = [row for row in rows if not row.get("error")]
    header = ["way", "trained", "γ", "loss", "facts", "manner", "peak, GB", "transformers", "peft"]
    share = "{} of {}".format
    lines = [["before training", *[""] * (len(header) - 1)]]
    if runs:
        lines[0][3] = f"{runs[0]['loss before']:.3f}"
    for column in ("facts", "manner"):
        lines[0][header.index(column)] = share(before[column], before["questions"])
    for row in runs:
        given = [f"{row[name]:.0e}" if name in row else "" for name in ("transformers", "peft")]
        own, *others = [f"{size / 1e9:.2f}" for size in row["peak"].values()]
        gamma = f"1/{round(1 / row['gamma'])}" if row["gamma"] else "0"
        scores = [share(row[name], row["questions"]) for name in ("facts", "manner")]
        loss = f"{row['loss']:.3f}"
        lines.append([row["way"], trained_of(row), gamma, loss, *scores, own, *given])
        if others:
            blank = [""] * (len(header) - 4)
            lines.append([f"{row['way']}, checkpointed", trained_of(row), gamma, *blank, ""])
            lines[-1][header.index("peak, GB")] = others[0]
    return records.markdown(header, lines)


def answers_table(rows: list[dict[str, Any]]) -> str:
    """What is answered to some of the questions."""
    rows, lines = [row for row in rows if not row.get("error")], []
    names = ["before training", *(f"{r['way']}, {trained_of(r)}" for r in rows[1:])]
    for i, (question, _) in enumerate(rows[0]["answers"]):
        for name, row in zip(names, rows):
            answer = " ".join(row["answers"][i][1].split())
            short = answer if len(answer) <= 160 else f"{answer[:160]} …"
            lines.append([question if row is rows[0] else "", name, short])
    return records.markdown(["question", "model", "answer"], lines)

"""Tables and pictures of answers."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Row, key_of

#: Metrics of answers that a model ends by itself: their tokens, and the share that did not run into the limit.
LENGTH, ENDED = "output tokens", "ended"


def interval(*groups: Sequence[float], resamples: int = 2000) -> tuple[float, float] | tuple[None, None]:
    """The middle 95% of the means of resamples (bootstrap), over groups the mean of theirs; single values have none."""
    if max(map(len, groups)) < 2:
        return None, None
    dice = np.random.default_rng(0)
    of_groups = (dice.choice(np.asarray(of, dtype=float), (resamples, len(of))).mean(axis=1) for of in groups)
    means = np.mean(list(of_groups), axis=0)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def with_interval(of: dict[str, Any], form: str) -> str:
    """A mean and, if it has one, its interval, each in the format ``form``."""
    mean = format(of["mean"], form)
    return mean if of["low"] is None else f"{mean} [{of['low']:{form}}, {of['high']:{form}}]"


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one cell: by metric the mean over contexts, its interval, and each context's; and what was kept."""
    figures: dict[str, Any] = {"kept": float(np.mean([record["kept"] / record["prompt"] for record in records]))}
    for metric in records[0]["scores"]:
        by_context: dict[int, list[float]] = {}
        for record in sorted(records, key=key_of):
            by_context.setdefault(record["index"], []).append(record["scores"][metric])
        values = [float(np.mean(scores)) for scores in by_context.values()]
        low, high = interval(values)
        figures[metric] = {"mean": float(np.mean(values)), "low": low, "high": high, "contexts": values}
    return figures


def tabulate(records: Sequence[dict[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    """Cells by mode, row and column (task and length)."""
    table: dict[str, Any] = {}
    for mode in dict.fromkeys(record["mode"] for record in records):
        for row in rows:
            of_row = [record for record in records if (record["mode"], record["row"]) == (mode, str(row))]
            columns = sorted({(record["task"], record["length"]) for record in of_row})
            for task, length in columns:
                cell = [record for record in of_row if (record["task"], record["length"]) == (task, length)]
                table.setdefault(mode, {}).setdefault(str(row), {})[f"{task} {length}"] = summarize(cell)
    return table


def main_metric(cell: dict[str, Any]) -> dict[str, Any]:
    """The first of a cell's metrics."""
    return next(value for name, value in cell.items() if name != "kept")


def show(table: dict[str, Any]) -> None:
    """Prints it."""
    for mode, by_row in table.items():
        columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
        print(f"\n{mode} prefill; mean and 95% interval over contexts\n")
        print("| | kept |" + "".join(f" {column} |" for column in columns) + "\n|---|---|" + "---|" * len(columns))
        counts = [
            max(len(main_metric(cells[column])["contexts"]) for cells in by_row.values() if column in cells)
            for column in columns
        ]
        print("| contexts | |" + "".join(f" {count} |" for count in counts))
        for row, cells in by_row.items():
            kept = np.mean([cell["kept"] for cell in cells.values()])
            shown = [main_metric(cells[column]) if column in cells else None for column in columns]
            text = (f" {with_interval(of, '.2f')} |" if of else " - |" for of in shown)
            print(f"| {row} | {kept:.1%} |" + "".join(text))


def show_by_policy(table: dict[str, Any], rows: Sequence[Row]) -> None:
    """Prints means alone: a line for each policy, in each cell those of its budgets."""
    for mode, by_row in table.items():
        columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
        full = by_row.get("full", {})
        print(f"\n{mode} prefill; {' / '.join(dict.fromkeys(row.budget for row in rows if row.budget))} kept\n")
        heads = (
            f" {column} (full {main_metric(full[column])['mean']:.2f}) |" if full else f" {column} |"
            for column in columns
        )
        print("| |" + "".join(heads) + "\n|---|" + "---|" * len(columns))
        for policy, of_policy in itertools.groupby((row for row in rows if row.budget), key=lambda row: row.policy):
            cells = [by_row.get(str(row), {}) for row in of_policy]
            means = (
                " ".join(f"{main_metric(cell[column])['mean']:.2f}" if column in cell else "-" for cell in cells)
                for column in columns
            )
            print(f"| `{policy}` | " + " | ".join(means) + " |")


def show_lengths(table: dict[str, Any]) -> None:
    """Prints how long answers are that models end by themselves: evicted ones may ramble."""
    for mode, by_row in table.items():
        lines = {row: [cell for cell in cells.values() if LENGTH in cell] for row, cells in by_row.items()}
        if not any(lines.values()):
            continue
        print(f"\n{mode} prefill; tokens of an answer, and answers that ended before the limit\n")
        print("| | tokens | ended |\n|---|---|---|")
        for row, cells in lines.items():
            if cells:
                length, ended = (np.mean([cell[name]["mean"] for cell in cells]) for name in (LENGTH, ENDED))
                print(f"| {row} | {length:.0f} | {ended:.2f} |")


def compare(table: dict[str, Any], own: str, others: Sequence[str], budgets: Sequence[str]) -> dict[str, Any]:
    """A policy against the better of others, context by context: by mode, column and budget the mean difference, its
    interval, and which other it was.
    """
    found: dict[str, Any] = {}
    for mode, by_row in table.items():
        for column, budget in itertools.product(by_row.get("full", {}), budgets):
            cells = {policy: by_row.get(f"{policy} {budget}", {}).get(column) for policy in (own, *others)}
            if not all(cells.values()):
                continue
            contexts = {policy: np.array(main_metric(cell)["contexts"]) for policy, cell in cells.items()}
            better = max(others, key=lambda policy: contexts[policy].mean())
            common = min(len(contexts[own]), len(contexts[better]))
            difference = contexts[own][:common] - contexts[better][:common]
            low, high = interval(difference)
            figures = {"mean": float(difference.mean()), "low": low, "high": high, "better": better}
            found.setdefault(mode, {}).setdefault(column, {})[budget] = figures
    return found


def show_comparison(found: dict[str, Any], own: str, others: Sequence[str]) -> None:
    """Prints it; what is below the better of the others beyond its interval is marked."""
    for mode, by_column in found.items():
        print(f"\n{mode} prefill; {own} minus the better of {' and '.join(others)}, with 95% intervals over contexts\n")
        budgets = list(dict.fromkeys(budget for cells in by_column.values() for budget in cells))
        print("| |" + "".join(f" {budget} |" for budget in budgets) + "\n|---|" + "---|" * len(budgets))
        for column, cells in by_column.items():
            texts = (
                with_interval(of, "+.2f") + (" below" if of["high"] is not None and of["high"] < 0 else "")
                for of in (cells[budget] for budget in budgets if budget in cells)
            )
            print(f"| {column} | " + " | ".join(texts) + " |")


def draw(table: dict[str, Any], rows: Sequence[Row], file: Path) -> None:
    """Accuracy against budget, a picture for each mode, a panel for each column; intervals unless they pile up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for mode, by_row in table.items():
        columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
        wide = min(len(columns), 4)
        figure, axes = pyplot.subplots(
            -(-len(columns) // wide),
            wide,
            figsize=(4 * wide + 2, 3.4 * -(-len(columns) // wide)),
            layout="constrained",
            squeeze=False,
        )
        lines = {}
        for axis, column in itertools.zip_longest(axes.flat, columns):
            if column is None:
                axis.axis("off")
                continue
            axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
            for policy, of_policy in itertools.groupby(rows, key=lambda row: row.policy):
                points = [
                    (float(row.budget or 0), main_metric(by_row[str(row)][column]))
                    for row in of_policy
                    if column in by_row.get(str(row), {})
                ]
                if policy == "full" and points:
                    lines[policy] = axis.axhline(points[0][1]["mean"], color="black", linestyle="--")
                elif points:
                    budgets, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                    (lines[policy],) = axis.plot(budgets, [cell["mean"] for cell in cells], marker="o", markersize=3)
                    if len({row.policy for row in rows}) <= 6:
                        # One context has no interval: as a float ``None`` is not a number, and not drawn.
                        bounds = (np.array([cell[bound] for cell in cells], dtype=float) for bound in ("low", "high"))
                        axis.fill_between(budgets, *bounds, alpha=0.08, color=lines[policy].get_color())
            axis.set(title=column, xlabel="budget", ylim=(-0.03, 1.03), xscale="log")
            ticks = sorted({float(row.budget) for row in rows if row.budget})
            axis.set_xticks(ticks, [f"{tick:.0%}" if tick <= 1 else f"{tick:.0f}" for tick in ticks], minor=False)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        figure.legend(lines.values(), lines.keys(), loc="outside right center")
        figure.savefig(file.with_name(f"{file.stem}_{mode}.png"), dpi=110)
        pyplot.close(figure)


def draw_depths(records: Sequence[dict[str, Any]], rows: Sequence[Row], file: Path) -> None:
    """Heat maps of needles by depth and length, a picture for each mode, a line of panels for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [record for record in records if "depth" in record]
    for mode in sorted({record["mode"] for record in found}):
        of_mode = [record for record in found if record["mode"] == mode]
        lengths, depths = (sorted({record[name] for record in of_mode}) for name in ("length", "depth"))
        asked = {record["row"] for record in of_mode}
        by_policy = itertools.groupby((row for row in rows if str(row) in asked), key=lambda row: row.policy)
        lines = [list(of_policy) for _, of_policy in by_policy]
        high, wide = len(lines), max(map(len, lines))
        shown = [row for line in lines for row in [*line, *[None] * (wide - len(line))]]
        figure, axes = pyplot.subplots(
            high, wide, figsize=(2.6 * wide + 1, 2.2 * high), layout="constrained", squeeze=False
        )
        for axis, row in zip(axes.flat, shown, strict=True):
            if row is None:
                axis.axis("off")
                continue
            cells = np.full((len(depths), len(lengths)), np.nan)
            for (y, depth), (x, length) in itertools.product(enumerate(depths), enumerate(lengths)):
                scores = [
                    next(iter(record["scores"].values()))
                    for record in of_mode
                    if (record["row"], record["length"], record["depth"]) == (str(row), length, depth)
                ]
                cells[y, x] = np.mean(scores) if scores else np.nan
            image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set(title=str(row), xticks=range(len(lengths)), yticks=range(len(depths)))
            axis.set_xticklabels([f"{length:,}" for length in lengths], fontsize=7)
            axis.set_yticklabels([f"{depth:.0%}" for depth in depths], fontsize=7)
        figure.colorbar(image, ax=axes, label="found")
        figure.supxlabel("context, tokens")
        figure.supylabel("depth of the needle")
        figure.savefig(file.with_name(f"{file.stem}_depths_{mode}.png"), dpi=110)
        pyplot.close(figure)

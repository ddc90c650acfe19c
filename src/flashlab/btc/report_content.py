"""The words and tables of a report: sections of blocks, which the templates render."""

import inspect
from typing import Any

from flashlab.btc.bars import FEATURES
from flashlab.btc.baselines import BASELINES
from flashlab.btc.metrics import (
    COMPARISONS,
    ROWS,
    TITLES,
    comparisons,
    number,
    other_data,
    real_error,
    time_range,
    verdicts,
)
from flashlab.report import Picture, Section, Table, Text, Verdicts, flatten

FEW_BLOCKS = 10


def sections(metrics: dict[str, Any], pictures: set[str]) -> list[Section]:
    """Say what the numbers mean, and what they do not.

    Args:
        metrics: the content of `metrics.json`.
        pictures: the names of the pictures that were drawn.
    """
    return [
        Section("In short", [Text(_scored(metrics)), Verdicts(verdicts(metrics))]),
        Section(
            "Skill against the baselines",
            [
                Text(_skill(metrics)),
                Picture("skill", "Skill by feature. Baselines that forecast the same are drawn once."),
                Table("The average RMSE is that of the four prices.", COMPARISONS, comparisons(metrics), align="lrlrr"),
                Text(f"The baselines. {_baselines(metrics)}"),
            ],
        ),
        Section(
            "Errors in units of price and volume",
            [
                Text(
                    "A basis point (bp) is 0.01 % of the price. Errors of volume are factors: 2 says that 1 + forecast "
                    "is typically twice or half of 1 + truth, in BTC. RMSE, the root of the mean squared error, weighs "
                    "large errors more than MAE, the mean absolute error. The average is over the four prices."
                ),
                _errors(metrics, "rmse"),
                _errors(metrics, "mae"),
                Picture(
                    "errors",
                    "How the errors are spread, for the model and for the baseline with the smallest RMSE. Flanks "
                    "above the dotted line: large errors are more frequent than a normal distribution has them. One "
                    "in a thousand lies beyond the edges.",
                ),
            ],
        ),
        Section(
            "Forecasts and what happened",
            [
                Text(
                    "Two stretches, chosen by a rule and not by eye: time is cut into blocks of two hours (UTC) and "
                    "ranked by the sum of their bars' squared ranges from low to high. Shown are the block in the "
                    "middle and the last. Blocks that lack more than a tenth of their minutes are left out. Every "
                    "point is forecast one minute ahead. Below each price stands the same as a move from the last "
                    "close: what there was to forecast is how far the truth lies from the dashed line."
                ),
                Picture("together", "All features: true bars and volumes, and the range, close and volume forecast."),
                *(Picture(feature, _capital(feature)) for feature in FEATURES),
            ],
        ),
        Section("Training", [_losses(pictures)]),
        Section(
            "Errors in z-scores, the units of the published table",
            [
                Text(
                    "A z-score is (log value - mean) / standard deviation, with the scaler of the prepared set. These "
                    "are the numbers to set beside other work, and the easiest to misread. A price R2 near 1 is no "
                    "achievement: it compares with always forecasting the mean price of the whole part, and whatever "
                    "repeats the last price gets it, as the baselines below do. MAPE divides by a z-score, which "
                    "passes through zero, so a few bars decide it."
                ),
                *(_z_scores(metrics, name) for name in metrics["scores"]),
            ],
        ),
        Section(
            "What this does not mean",
            [
                Text(
                    "This demonstrates a method on one market and one stretch of time. It is not trading advice. Skill "
                    "in High and Low is knowledge of how wide the next bar will be, not of where the price goes. Skill "
                    "in Open is mostly the knowledge that a bar opens where the last one closed. Only Close speaks of "
                    "direction; whatever skill there is lasts a minute, and leaves out the spread, the fees and the "
                    "delay that anyone who trades pays."
                )
            ],
        ),
        Section("The run", [Table("", ("what", "value"), list(flatten(metrics.get("run", {}))), align="ll")]),
    ]


def _scored(metrics: dict[str, Any]) -> str:
    text = (
        f"{metrics['rows']:,} bars of one minute, {time_range(metrics)} ({metrics['days']} days), each forecast from "
        "the bars before it and scored beside forecasts that need no model."
    )
    if metrics["distinct_rows"] < metrics["rows"]:
        text += f" Windows overlap: {metrics['distinct_rows']:,} of the bars are different ones."
    return " ".join([text, *other_data(metrics)])


def _skill(metrics: dict[str, Any]) -> str:
    one_block = "one day" if metrics["block_days"] == 1 else f"{metrics['block_days']} days"
    text = (
        "Skill is the share of the baseline's root mean squared error (RMSE) that the model saves: 1 - RMSE of the "
        "model / RMSE of the baseline. At 100 % the model would be perfect, at zero it is as good as the baseline, and "
        "below zero it is worse. Behind ± stands one standard error. Neighbouring minutes err alike, so it is found by "
        f"leaving out {one_block} at a time (a jackknife over {metrics['blocks']} blocks). A skill within two standard "
        "errors of zero is a tie. The average is the mean of the five skills."
    )
    if metrics["blocks"] < FEW_BLOCKS:
        text += " So few blocks make the standard errors themselves rough."
    return text


def _baselines(metrics: dict[str, Any]) -> str:
    known = [name for name in metrics["skill"] if name in BASELINES]
    return " ".join(f"{_capital(TITLES[name])}: {inspect.getdoc(BASELINES[name])}" for name in known)


def _errors(metrics: dict[str, Any], metric: str) -> Table:
    scores = metrics["scores"]
    rows = [(_capital(row), *(real_error(scores[name][row], metric) for name in scores)) for row in ROWS]
    header = ("Feature", *(_capital(TITLES.get(name, name)) for name in scores))
    return Table(metric.upper(), header, rows, align="l" + "r" * len(scores))


def _z_scores(metrics: dict[str, Any], name: str) -> Table:
    forms = {"mse": "#.3g", "rmse": "#.3g", "mae": "#.3g", "mape": "#.3g", "r2": ".6f"}
    scores = metrics["scores"][name]
    rows = [(_capital(row), *(number(scores[row][metric], form) for metric, form in forms.items())) for row in ROWS]
    return Table(_capital(TITLES.get(name, name)), ("Feature", *map(str.upper, forms)), rows, align="lrrrrr")


def _losses(pictures: set[str]) -> Text | Picture:
    if "losses" not in pictures:
        return Text("The run holds no TensorBoard log, so there are no loss curves.")
    return Picture(
        "losses",
        "Losses over the optimiser's steps. Pale: single batches; line: their moving average over a hundredth of the "
        "run. The circle marks the lowest validation loss.",
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]

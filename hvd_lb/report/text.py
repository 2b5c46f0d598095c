"""Numbers and names in words: units, plurals, one line each."""

from __future__ import annotations

from typing import Any


def evaluation_line(record: dict[str, Any]) -> str:
    top1, top5, loss = (
        figure(record.get(name), form)
        for name, form in (("top1_error", ".2f"), ("top5_error", ".2f"), ("loss", ".4f"))
    )
    averaged = ""
    if "ema_top1_error" in record:
        averaged = f" (averaged weights: top-1 error {figure(record['ema_top1_error'], '.2f')} %)"
    return (
        f"epoch {record.get('epoch')} step {record['step']} evaluation: top-1 error {top1} %, "
        f"top-5 error {top5} %, loss {loss}, {figure(record.get('images'), ',')} images{averaged}"
    )


def figure(value: float | None, form: str) -> str:
    """A number of a record in this format; None stands for one that is not finite."""
    return "nan" if value is None else format(value, form)


def printable(text: str) -> str:
    """On one line and of whole characters: names of files may hold anything."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )


def count(number: int, noun: str) -> str:
    """1 step, 2 steps, 1,000 processes."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else ending)


def speed(images_per_second: float | None) -> str:
    """With two digits at least."""
    if images_per_second is None:
        return "nan images/s"
    digits = f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"
    return f"{digits} images/s"


def duration(seconds: float) -> str:
    """Seconds in words with sensible units: 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for big, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def rescale_in_words(record: dict[str, Any]) -> str:
    """`2 virtual workers from here on, before 4: minibatches of 192 images, learning rate 0.1, rising to 0.2`."""
    rate, full = record.get("lr"), record.get("full_lr")
    rising = f", rising to {figure(full, '.4g')}" if full != rate else ""
    return (
        f"{count(record['workers'], 'virtual worker')} from here on, before {record.get('before')}: minibatches of "
        f"{figure(record.get('global_batch'), ',')} images, learning rate {figure(rate, '.4g')}{rising}"
    )


def audit_in_words(record: dict[str, Any]) -> str:
    """Who computed what wrongly, by an audit, and how the step is taken now."""
    again = "the step is taken again"
    liars, hosts = record.get("liars") or [], record.get("hosts") or []
    places = [f" on {host}" for host in hosts] or [""] * len(liars)
    gpus = [f", {gpu}," for gpu in record.get("gpus") or []] or [""] * len(liars)
    who = " and ".join(
        f"rank {rank}{place}{gpu}" for rank, place, gpu in zip(liars, places, gpus, strict=False)
    )
    if record.get("taken_out"):
        again += f" without {'it' if len(liars) == 1 else 'them'}"
    elif (moved := record.get("moved_to")) is not None:
        again += f", with rank {moved} computing that"
    workers = ", ".join(map(str, record.get("workers") or []))
    return f"{who} computed virtual worker {workers} wrongly (--audit); {again}"


def generation_in_words(record: dict[str, Any]) -> str:
    """`3 processes go on, before 4 (lost: rank 2 on h1 (ended by SIGKILL)); this step is taken again`."""
    lost, left = (", ".join(map(str, record.get(name) or ())) for name in ("lost", "left"))
    why = [f"lost: {lost}" if lost else "", f"asked to leave: {left}" if left else ""]
    why.append(f"new: {record['joined']}" if record.get("joined") else "")
    number = record.get("processes")
    go_on = "1 process goes on" if number == 1 else f"{number} processes go on"
    return (
        f"{go_on}, before {record.get('before')} "
        f"({'; '.join(filter(None, why)) or 'an exchange failed'})"
        + ("; this step is taken again" if record.get("repeated") else "")
    )

"""The final answer in a response: what stands after the thinking part, and the last box or tag in it."""

__all__ = ["after_thinking", "last_boxed", "last_tagged"]

OPEN, CLOSE = "<think>", "</think>"


def after_thinking(response: str) -> str | None:
    """What follows the last </think>; all of it if the response has no thinking tags; None if thinking was never closed."""
    if CLOSE in response:
        return response.rpartition(CLOSE)[2]
    return None if OPEN in response else response


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...}, braces balanced (\{ and \} do not count); None without a whole one.

    A last box that is never closed gives None, not the box before it: the answer was cut off.
    """
    start = max(
        (text.rfind(command) + len(command) for command in (r"\boxed{", r"\fbox{") if command in text), default=-1
    )
    if start < 0:
        return None
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
        at += 1
    return None


def last_tagged(text: str, tag: str) -> str | None:
    """Content of the last <tag>...</tag>; None without a whole one."""
    _, opened, rest = text.rpartition(f"<{tag}>")
    content, closed, _ = rest.partition(f"</{tag}>")
    return content.strip() if opened and closed else None

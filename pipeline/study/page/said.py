"""Sentences that stand beside the pictures: noise, and effects that change their sign."""

from pipeline.study.page.families import Family


def noises(family: Family) -> list[str]:
    return []


def flips(family: Family) -> list[str]:
    return []

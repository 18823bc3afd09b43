"""Policies against a target written out by hand: what they ask the decoder, what they write, and what they take
back.
"""

from __future__ import annotations

import pytest
import torch

from leapformer.models.translation_stream import WHOLE_SOURCE
from leapformer.tasks.simulst.streaming.policies import AlignAtt, LocalAgreement, WaitK, common_prefix
from leapformer.tasks.simulst.streaming.policy_requests import Read, Restore, Save, Write, Written
from leapformer.tasks.simulst.streaming.turns import Step

END = 2


class Target:
    """A target whose decoder is a list of the tokens that it was run on."""

    def __init__(self, *, room=100, continuous=False, pre_decision=3):
        self.last, self.available, self.source_ended, self.ended = 1, 0, False, False
        self.memory, self.pre_decision, self.continuous, self.ends = None, pre_decision, continuous, [END]
        self.most, self.tokens, self.ran, self.saved = room, [], [], None

    @property
    def written(self):
        return len(self.tokens)

    @property
    def room(self):
        return self.most - self.written

    @property
    def is_open(self):
        return self.room > 0 and not self.ended

    @property
    def chunks(self):
        return -(-self.available // self.pre_decision)

    def write(self, token):
        self.tokens.append(token)
        self.last, self.ended = token, token == END

    def save(self):
        self.saved = list(self.ran), list(self.tokens), self.last, self.ended

    def restore(self):
        self.ran, self.tokens, self.last, self.ended = self.saved
        self.saved = None


def answer(target, policy, translation, *, looks_at=None):
    """Let the policy write; after n tokens `translation`[n] is proposed, with the attention on chunk looks_at[n]."""
    asked, turn, written = [], policy.turn(target), None
    while True:
        try:
            request = turn.send(written)
        except StopIteration:
            request = Read()
        written = None
        if isinstance(request, Read):
            target.memory = request.memory
            assert target.ran == [1, *target.tokens][: len(target.ran)]  # what was run is what is written
            return asked
        if isinstance(request, Save | Restore):
            target.save() if isinstance(request, Save) else target.restore()
            continue
        assert isinstance(request, Write) and target.is_open
        asked.append(Step(target.last, target.available if request.see is None else request.see))
        target.ran.append(target.last)
        place = len(target.ran) - 1
        mass = None
        if looks_at is not None:
            mass = torch.zeros(2, 4, target.chunks)
            if looks_at[place] is not None:
                mass[:, :, looks_at[place]] = 1
        written = Written(translation[place] if request.token is None else request.token, torch.zeros(9), mass)
        target.write(written.token)


# ---- wait-k


def test_wait_k_reads_k_chunks_and_then_writes_one_token_for_each():
    target, policy = Target(), WaitK(2)
    written = []
    for _ in range(4):
        target.available += 3
        answer(target, policy, [5, 6, 7, 8, END])
        written.append(len(target.tokens))
    assert written == [0, 1, 2, 3]
    target.available, target.source_ended = 13, True
    assert answer(target, policy, [5, 6, 7, 8, END]) == [Step(7, 15), Step(8, 18)]
    assert target.tokens == [5, 6, 7, 8, END]


def test_wait_k_for_the_whole_source():
    target = Target()
    target.available = 300
    assert answer(target, WaitK(None), [5, END]) == [] and target.ran == []
    target.source_ended = True
    assert answer(target, WaitK(None), [5, END]) == [Step(1, WHOLE_SOURCE), Step(5, WHOLE_SOURCE)]


def test_wait_k_stops_at_an_end_and_where_there_is_no_room():
    target = Target(room=2)
    target.available, target.source_ended = 9, True
    answer(target, WaitK(1), [5] * 9)
    assert target.tokens == [5, 5]
    target = Target()
    target.available = 90
    answer(target, WaitK(1), [5, END, 7])
    assert target.tokens == [5, END]


# ---- local agreement


def test_local_agreement_writes_what_two_translations_begin_with():
    target, policy = Target(), LocalAgreement(2)
    written = []
    for translation in ([5, 6, END], [5, 7, END], [5, 7, 8, END], [5, 7, 8, END]):
        target.available += 3
        answer(target, policy, translation)
        written.append(list(target.tokens))
    # The last two agree on the end as well, which only the end of the source makes true.
    assert written == [[], [5], [5, 7], [5, 7, 8]]
    assert target.ran == [1, 5, 7]  # the decoder is as if nothing else had been tried
    target.source_ended = True
    answer(target, policy, [5, 7, 8, 9, END])
    assert target.tokens == [5, 7, 8, 9, END]


def test_local_agreement_of_three_and_its_horizon():
    target, policy = Target(), LocalAgreement(3, ahead=2)
    lengths = []
    for _ in range(3):
        target.available += 3
        asked = answer(target, policy, [5, 6, 7, 8, 9, END])
        lengths.append((len(asked), len(target.tokens)))
        assert all(step.see == target.available for step in asked)
    assert lengths == [(2, 0), (2, 0), (4, 2)]  # two steps to look ahead, two more for what is written


def test_local_agreement_believes_an_end_where_another_sentence_follows():
    target = Target(continuous=True)
    for _ in range(2):
        target.available += 3
        answer(target, LocalAgreement(), [5, END])
    assert target.tokens == [5, END] and target.ended


def test_nothing_is_asked_without_a_source():
    for policy in (WaitK(1), LocalAgreement(), AlignAtt()):
        assert answer(Target(), policy, [5]) == []


# ---- AlignAtt


def test_align_att_writes_while_the_attention_is_on_earlier_chunks():
    target, policy = Target(), AlignAtt(1)
    looks_at = [0, 1, 2, 2]
    written = []
    for _ in range(4):
        target.available += 3
        answer(target, policy, [5, 6, 7, END], looks_at=looks_at)
        written.append(list(target.tokens))
    assert written == [[], [5], [5, 6], [5, 6, 7]]  # the end waits for the source's
    target.source_ended = True
    answer(target, policy, [5, 6, 7, END], looks_at=looks_at)
    assert target.tokens == [5, 6, 7, END]


def test_align_att_with_a_wider_margin_reads_further():
    for frames, expected in ((1, 3), (2, 2), (3, 1), (4, 0)):
        target = Target()
        target.available = 11  # four chunks, the last not whole
        answer(target, AlignAtt(frames), [5, 6, 7, 8], looks_at=[0, 1, 2, 3])
        assert len(target.tokens) == expected


def test_align_att_looks_at_the_layers_that_it_is_told():
    mass = torch.zeros(2, 3, 4)
    mass[0, :, 0], mass[1, :, 3] = 1, 2
    assert not AlignAtt(1).looks_back(mass, 4)
    assert AlignAtt(1, layers=(0,)).looks_back(mass, 4) and AlignAtt(3, layers=(-2,)).looks_back(mass, 4)
    assert not AlignAtt(1, layers=(1,)).looks_back(mass, 4)
    with pytest.raises(ValueError, match="layers: expected indices of 2 decoder layers, found 2"):
        AlignAtt(1, layers=(0, 2)).looks_back(mass, 4)


def test_align_att_does_not_trust_a_token_that_looks_nowhere():
    target = Target()
    target.available = 9
    answer(target, AlignAtt(), [5, 6], looks_at=[None, None])
    assert target.tokens == []


# ---- all


def test_wrong_numbers_are_one_clear_line():
    with pytest.raises(ValueError, match="k: expected at least 1 chunk, or None for the whole source, found 0"):
        WaitK(0)
    with pytest.raises(ValueError, match="n: expected at least 2 translations that agree, found 1"):
        LocalAgreement(1)
    with pytest.raises(ValueError, match="ahead: expected at least 1 token, found 0"):
        LocalAgreement(2, ahead=0)
    with pytest.raises(ValueError, match="frames: expected at least 1 chunk, found 0"):
        AlignAtt(0)


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == [] and common_prefix([[], [1]]) == []

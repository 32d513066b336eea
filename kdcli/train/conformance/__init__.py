"""What every objective must satisfy, measured through its public interface: `kdcli verify` and the tests run it.

`suite` has the checks. `batches` and `case` make random data for any objective by its scope, needs and columns,
`models` two tiny models to train. An objective may say of itself, as attributes of its class or of an instance:

    zero_at_teacher  value and gradient vanish where the student computes what the teacher does, and no value is below 0
    f_divergence     merging ids never raises it: a top-k teacher bounds it from below
    stops_gradient   it detaches parts: its gradient is the slope of the value with those held fixed
    falls = False    its value need not fall in training, such as that of a policy gradient
    hard_part        a part of it has no temperature, such as a cross-entropy
    reads_prompt     it reads hidden states of positions whose target is not supervised
    draws            it draws ids at random, by their order

Its formula, a second time, is a static method `oracle` in float64 numpy: of one target, `oracle(y, z, target, ...)`
with the logits [V] of teacher and student (scope CHUNK), or of a micro-batch, `oracle(batch, student, teacher, ...)`
with copies of the records of kdcli.api that hold arrays. It takes by name the settings that it reads, `parameters`
(name -> array) and `tokenizers` (student's, teacher's), and returns NaN where the objective has no unit.
"""

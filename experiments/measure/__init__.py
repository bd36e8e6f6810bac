"""Measurements: what is behind the tables of the pages. Commands that people run lie one folder up.

===============  ==============================================================================
results          all of it in stages: what each gives, how long it takes, the command
pages            writes the tables of the pages from the results, and checks them
records          a result: rows, and what made them
sources          the code that a result depends on
ways, networks   what is compared, on what
memory, timing   how: compiled programs, and rounds in which everything runs once
runs             networks trained from seeds, each of them once, and a row of each
smollm2          a pretrained decoder, and how it is fine-tuned on e2e_data
side_by_side     what takes more cores than one program to be compiled
===============  ==============================================================================
"""

package main

import (
	"regexp"
	"slices"
	"testing"
)

func TestEverybodyIsMeasuredOnStoresThatTheyHave(t *testing.T) {
	for _, g := range plan() {
		for _, p := range g.processes {
			switch {
			case p.side == reference && p.store == postgreSQL:
				t.Errorf("%s: the reference knows no PostgreSQL", p.name())
			case p.side != reference && p.store == memory:
				t.Errorf("%s: only the reference is measured in memory", p.name())
			}
		}
		if len(g.processes) == 0 || g.processes[0].side != hook {
			t.Errorf("%s does not begin with ours", g.name)
		}
	}
}

func TestWithoutTheReferenceOursAloneIsMeasured(t *testing.T) {
	all, chosen := plan(), choose(plan(), regexp.MustCompile("^(keys)"), false)
	if len(chosen) != 2 || len(choose(all, regexp.MustCompile("^()"), true)) != len(all) {
		t.Fatalf("chose %d groups of %d", len(chosen), len(all))
	}
	for _, g := range chosen {
		if slices.ContainsFunc(g.processes, func(p process) bool { return p.side == reference }) {
			t.Errorf("the reference is to be started for %s", g.name)
		}
		if !slices.ContainsFunc(g.processes, func(p process) bool { return p.side == stock }) {
			t.Errorf("stock mautrix is left out of %s", g.name)
		}
	}
}

func TestReferenceGetsItsOptionsWithTwoDashes(t *testing.T) {
	if got := doubleDashes([]string{"-work", "keys-1"}); !slices.Equal(got, []string{"--work", "keys-1"}) {
		t.Errorf("got %v", got)
	}
}

package main

import (
	"fmt"
	"regexp"
	"strconv"

	"sendertrust/bench/figures"
)

// process is one process to start.
type process struct {
	side, store, work string
	// options are further ones of bench one, and of the reference.
	options []string
}

func (p process) name() string { return fmt.Sprintf("%s of %s on %s", p.work, p.side, p.store) }

// group are processes that are compared with each other, and take turns.
type group struct {
	name string
	// rounds bounds how many times each is started; 0: as many times as there are rounds.
	rounds    int
	processes []process
}

const (
	hook, stock, reference = "hook", "stock", "reference"
	full, normal           = "sqlite-full", "sqlite-normal"
	postgreSQL, memory     = "postgres", "memory"
	// answers is the work, and the program beside this one that does it.
	answers = "answers"
)

// plan is what is measured. The bot's processes are named by their side, too.
func plan() []group {
	groups := []group{
		{name: "keys-1", processes: sides("keys-1", full, normal, memory, postgreSQL)},
		{name: "keys-200", processes: sides("keys-200", full, normal, memory, postgreSQL)},
		{name: "first", processes: sides("first", full, postgreSQL)},
		{name: "query", processes: sides("query", full, postgreSQL)},
		{name: "memory", processes: []process{{hook, full, "memory", nil}, {reference, full, "memory", nil}}},
		{name: "memory-100000", rounds: 1, processes: []process{{hook, full, "memory", []string{"-keys", "100000"}}}},
	}
	for _, stored := range figures.Stored {
		options := []string{"-stored", strconv.Itoa(stored)}
		groups = append(groups, group{
			name: fmt.Sprint("stored-", stored), rounds: 3, processes: []process{{hook, full, "stored", options}, {reference, full, "stored", options}},
		})
	}
	return append(groups,
		group{name: "identity", processes: []process{{hook, full, "identity", nil}}},
		group{name: "room", rounds: 1, processes: []process{{hook, full, "room", nil}}},
		group{name: answers, rounds: 3, processes: []process{{hook, full, answers, nil}}},
	)
}

// sides has a work done by everybody who can, on these stores.
func sides(work string, stores ...string) (processes []process) {
	for _, store := range stores {
		for _, side := range []string{hook, reference, stock} {
			if side != hook && store == normal && side == stock || side == reference && store == postgreSQL || side != reference && store == memory {
				continue
			}
			processes = append(processes, process{side, store, work, nil})
		}
	}
	return processes
}

// checked is what make bench-check measures: the hook against stock mautrix.
func checked() (groups []group) {
	for _, work := range []string{"keys-1", "keys-200", "first", "query"} {
		groups = append(groups, group{name: work, processes: []process{{hook, full, work, nil}, {stock, full, work, nil}}})
	}
	return groups
}

// choose leaves the groups whose names match, and the processes that can be started.
func choose(groups []group, only *regexp.Regexp, withReference bool) (chosen []group) {
	for _, g := range groups {
		if !only.MatchString(g.name) {
			continue
		}
		var processes []process
		for _, p := range g.processes {
			if p.side != reference || withReference {
				processes = append(processes, p)
			}
		}
		g.processes = processes
		chosen = append(chosen, g)
	}
	return chosen
}

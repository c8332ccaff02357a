package soak

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// result is one line of the table that a soak ends with.
type result struct {
	// part is kills, faults, storage, floods or lies; what is the line's own name within it.
	part, what string
	// tries is how often what the line names was done; messages is how many were sent meanwhile.
	tries, messages int
	// Of these messages held were answered once and rightly, lost never, doubled more than once, and wrong otherwise than what is true.
	held, lost, doubled, wrong int
	// peak is the most memory that the bot had, in bytes; 0: not measured.
	peak int64
	// answers are how long the answers took, if that was measured, and usually is the same while nothing was the matter.
	answers, usually latency
	// note says what the numbers do not.
	note string
}

// latency are the median and the 99th percentile of answer times.
type latency struct{ median, p99 time.Duration }

func latencyOf(times []time.Duration) latency {
	if len(times) == 0 {
		return latency{}
	}
	sorted := slices.Sorted(slices.Values(times))
	return latency{sorted[len(sorted)/2], sorted[min(len(sorted)-1, len(sorted)*99/100)]}
}

func (l latency) String() string {
	if l == (latency{}) {
		return ""
	}
	return fmt.Sprintf("%d/%d", l.median.Milliseconds(), l.p99.Milliseconds())
}

// asPromised says that nothing is lost, doubled or wrong, and that there was anything at all.
func (r result) asPromised() bool { return r.lost+r.doubled+r.wrong == 0 && r.held > 0 }

// table collects the results of all parts.
type table struct {
	mu      sync.Mutex
	results []result
}

func (t *table) add(r result) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.results = append(t.results, r)
}

// print writes the table, parts together.
func (t *table) print(out io.Writer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.results) == 0 {
		return
	}
	slices.SortStableFunc(t.results, func(a, b result) int {
		return cmp.Or(strings.Compare(a.part, b.part), strings.Compare(a.what, b.what))
	})
	lines := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight|tabwriter.Debug)
	fmt.Fprintln(lines, "part\twhat\ttries\tmessages\theld\tlost\tdoubled\twrong\tpeak MiB\tanswer ms p50/p99\tusually\tnote\t")
	for _, r := range t.results {
		peak := ""
		if r.peak > 0 {
			peak = fmt.Sprint(r.peak >> 20)
		}
		fmt.Fprintf(lines, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%s\t%s\t\n",
			r.part, r.what, r.tries, r.messages, r.held, r.lost, r.doubled, r.wrong, peak, r.answers, r.usually, r.note)
	}
	_ = lines.Flush()
}

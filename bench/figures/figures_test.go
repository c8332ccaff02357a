package figures

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedianIsTheMiddleWhateverTheOrder(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1, 5}, 5},
		{[]float64{100, 2, 1, 3}, 2.5},
		{[]float64{5, 4, 3, 2, 1000}, 4},
	} {
		given := slices.Clone(test.values)
		if got, ok := Median(test.values); !ok || got != test.want {
			t.Errorf("Median(%v) = %v, %v", given, got, ok)
		}
		if !slices.Equal(given, test.values) {
			t.Errorf("Median has changed the order of %v", given)
		}
	}
	if _, ok := Median(nil); ok {
		t.Error("nothing has a median")
	}
}

var (
	ours   = Key{Side: hook, Store: sqliteFull, Work: "receive_1", Quantity: micros}
	theirs = Key{Side: reference, Store: sqliteFull, Work: "receive_1", Quantity: micros}
	stocks = Key{Side: stock, Store: sqliteFull, Work: "receive_1", Quantity: micros}
)

func runOf(values map[Key][]float64) *Run {
	run := &Run{}
	for key, list := range values {
		for _, value := range list {
			run.add(key, value)
		}
	}
	return run
}

func TestRatioIsOfTheMediansAndItsSpreadOfTheRounds(t *testing.T) {
	// The second round was noisy for both: the ratio of that round is like the others.
	run := runOf(map[Key][]float64{ours: {10, 40, 12}, theirs: {20, 100, 20}})
	ratio, ok := run.Ratio(ours, theirs)
	if want := (Ratio{0.6, 0.4, 0.6}); !ok || ratio != want {
		t.Errorf("the ratio is %+v, want %+v", ratio, want)
	}
	if _, ok = run.Ratio(ours, stocks); ok {
		t.Error("there is a ratio to what was not measured")
	}
}

func TestFiguresOfProcessesBecomeSeriesInTheirOrder(t *testing.T) {
	run := &Run{}
	for _, printed := range []string{
		`{"side":"hook","store":"sqlite-full","work":"receive_1","count":2000,"us_each":3,"peak_kib":7,"values":{"event_bytes":1990}}`,
		`{"side":"hook","store":"sqlite-full","work":"receive_1","count":2000,"us_each":2,"peak_kib":8}` + "\n" +
			`{"side":"hook","store":"sqlite-full","work":"receive_1","stored":1000,"us_each":9}`,
	} {
		measured, err := Read(strings.NewReader(printed))
		if err != nil {
			t.Fatal(err)
		}
		run.Add(measured)
	}
	if got := run.Values(ours); !slices.Equal(got, []float64{3, 2}) {
		t.Errorf("the times are %v", got)
	}
	for quantity, want := range map[string][]float64{"peak_kib": {7, 8}, "event_bytes": {1990}, "live_kib": nil} {
		key := ours
		if key.Quantity = quantity; !slices.Equal(run.Values(key), want) {
			t.Errorf("%s is %v, want %v", quantity, run.Values(key), want)
		}
	}
	if _, err := Read(strings.NewReader("thread 'main' panicked")); err == nil {
		t.Error("what is no figure was taken for one")
	}
}

func TestTableSaysWhatIsReachedAndWhatIsNot(t *testing.T) {
	alone := Key{Side: hook, Store: sqliteFull, Work: "start_stored", Stored: 1_000_000, Quantity: "peak_kib"}
	run := runOf(map[Key][]float64{ours: {200, 300, 250}, theirs: {1000, 1000, 1000}, stocks: {500, 500, 500}, alone: {102_401}})
	goals := []Goal{
		{Work: "reached", Of: ours, Against: &theirs, AtMost: 0.25},
		{Work: "not reached", Of: ours, Against: &stocks, AtMost: 0.4},
		{Work: "without a goal", Of: ours, Against: &stocks},
		{Work: "alone", Of: alone, AtMost: 100 << 10},
		{Work: "not measured", Of: ours, Against: &Key{Side: "nobody"}, AtMost: 1},
		{Work: "nor this", Of: Key{Side: "nobody"}},
	}
	table := run.Table(goals)
	want := `| work | ours | against | theirs | ratio | goal | |
|---|---|---|---|---|---|---|
| reached | 250 µs | reference | 1000 µs | 0.25 (0.20–0.30) | ≤ 0.25 | ✅ |
| not reached | 250 µs | stock mautrix | 500 µs | 0.50 (0.40–0.60) | ≤ 0.4 | ❌ |
| without a goal | 250 µs | stock mautrix | 500 µs | 0.50 (0.40–0.60) |  |  |
| alone | 100.0 MiB |  |  |  | ≤ 100.0 MiB | ❌ |
`
	if table != want {
		t.Errorf("the table is\n%s\nwant\n%s", table, want)
	}
	if missing := run.Missing(goals); !slices.Equal(missing, []string{"not measured", "nor this"}) {
		t.Errorf("missing are %q", missing)
	}
}

func TestTableOfTheGoalsHasEveryRowOnce(t *testing.T) {
	seen := make(map[string]bool)
	for _, goal := range Goals() {
		row := goal.Work + goal.other() + goal.Of.Store
		if seen[row] {
			t.Errorf("%q is there twice", row)
		}
		seen[row] = true
	}
}

func TestReplaceLeavesEverythingElseAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "performance.md")
	before := "# Title\n\n<!-- table -->\nold\nlines\n<!-- /table -->\n\nThe end.\n"
	if err := os.WriteFile(file, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Replace(file, "table", "new\n"); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if want := "# Title\n\n<!-- table -->\nnew\n<!-- /table -->\n\nThe end.\n"; err != nil || string(text) != want {
		t.Errorf("the file is %q (%v), want %q", text, err, want)
	}
	if err = Replace(file, "plot", "new\n"); err == nil {
		t.Error("a place was found that is not there")
	}
	if text, _ = os.ReadFile(file); !strings.Contains(string(text), "new\n") {
		t.Error("the file was written although there was no place")
	}
}

func TestCheckFailsForARatioThatIsWorseByMoreThanAFifth(t *testing.T) {
	kept := runOf(map[Key][]float64{ours: {40}, stocks: {100}, theirs: {1}})
	for _, test := range []struct {
		ours, stock float64
		worse       int
	}{
		{40, 100, 0},
		{400, 1000, 0}, // the machine is slower, and the hook is not
		{47, 100, 0},
		{49, 100, 1},
		{40, 80, 1},
	} {
		run := runOf(map[Key][]float64{ours: {test.ours}, stocks: {test.stock}})
		lines, worse := run.Check(kept)
		if len(lines) != 1 || len(worse) != test.worse {
			t.Errorf("%v against %v: compared %v, worse %v", test.ours, test.stock, lines, worse)
		}
	}
	noisy := runOf(map[Key][]float64{ours: {30, 40, 50}, stocks: {100, 100, 100}})
	for _, test := range []struct {
		ours  []float64
		worse int
	}{
		{[]float64{49, 60, 70}, 0}, // as good once as the worst that is kept
		{[]float64{51, 60, 70}, 1},
	} {
		run := runOf(map[Key][]float64{ours: test.ours, stocks: {100, 100, 100}})
		if lines, worse := run.Check(noisy); len(worse) != test.worse {
			t.Errorf("%v: compared %v, worse %v", test.ours, lines, worse)
		}
	}
	for name, runs := range map[string][2]*Run{
		"not measured": {runOf(map[Key][]float64{ours: {1}}), kept},
		"not kept":     {kept, runOf(map[Key][]float64{theirs: {1}})},
	} {
		if lines, worse := runs[0].Check(runs[1]); len(lines)+len(worse) != 0 {
			t.Errorf("%s, and yet compared: %v", name, lines)
		}
	}
}

func TestRunIsReadAsItWasKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "committed.json")
	run := runOf(map[Key][]float64{theirs: {1, 2.123456}, ours: {123456}})
	run.Made, run.Rounds, run.Machine = time.UnixMilli(1_700_000_000_000).UTC(), 5, Machine{Processor: "one", Processors: 2}
	if err := run.Save(file); err != nil {
		t.Fatal(err)
	}
	read, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if !read.Made.Equal(run.Made) || read.Rounds != 5 || read.Machine != run.Machine {
		t.Errorf("read %+v", read)
	}
	if got := read.Values(theirs); !slices.Equal(got, []float64{1, 2.123}) {
		t.Errorf("the values are %v", got)
	}
	if got := read.Values(ours); !slices.Equal(got, []float64{123500}) {
		t.Errorf("the values are %v", got)
	}
	if got := run.Values(theirs); !slices.Equal(got, []float64{1, 2.123456}) {
		t.Errorf("keeping a run has changed it: %v", got)
	}
	if read.Series[0].Key != ours {
		t.Errorf("%v is first", read.Series[0].Key)
	}
}

func TestFiguresOfAWorkTakeThePlaceOfFormerOnes(t *testing.T) {
	kept, again := &Run{}, &Run{}
	kept.Add([]Figure{{Side: "hook", Work: "query", MicrosEach: 9, PeakKiB: 90}, {Side: "hook", Work: "query", Stored: 1, MicrosEach: 8}, {Side: "stock", Work: "query", MicrosEach: 7}})
	again.Add([]Figure{{Side: "hook", Work: "query", MicrosEach: 3}})
	kept.Replace(again)
	for key, want := range map[Key][]float64{
		{Side: "hook", Work: "query", Quantity: "us_each"}:            {3},
		{Side: "hook", Work: "query", Quantity: "peak_kib"}:           nil,
		{Side: "hook", Work: "query", Stored: 1, Quantity: "us_each"}: {8},
		{Side: "stock", Work: "query", Quantity: "us_each"}:           {7},
	} {
		if got := kept.Values(key); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", key, got, want)
		}
	}
}

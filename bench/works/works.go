// Package works is our side of the benchmarks: what is measured, on the hook's public API and on stock mautrix.
package works

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/bench/figures"
	"sendertrust/bench/inputs"
	"sendertrust/bench/receiver"
)

// Options say what is measured, and of whom.
type Options struct {
	Side  receiver.Side
	Store receiver.Store
	// At is the database, which is new: a file's path, or PostgreSQL's URI.
	At string
	// Dir is for other files.
	Dir string
	// Profiles, if set, is a directory for a CPU profile of each work.
	Profiles string
	// Keys is how many room keys are received, Batch how many come in one /sync.
	Keys, Batch int
	// Stored is how many sessions are in the database before, for the works of many sessions.
	Stored int
	// NewBot makes the bot of the work "answers". Nil: this program has none.
	NewBot NewBot
}

// Run does a work and gives its figures.
func Run(ctx context.Context, work string, o Options) (measured []figures.Figure, err error) {
	run, ok := works[work]
	if !ok {
		return nil, fmt.Errorf("there is no work %q", work)
	}
	defer func() {
		switch failure := recover().(type) {
		case nil:
		case error:
			err = failure
		default:
			err = fmt.Errorf("%v", failure)
		}
	}()
	b := &bench{Options: o, ctx: ctx}
	run(b)
	return b.measured, nil
}

var works = map[string]func(b *bench){
	"keys-1":   func(b *bench) { b.keys(1) },
	"keys-200": func(b *bench) { b.keys(200) },
	"first":    (*bench).first,
	"query":    (*bench).query,
	"memory":   (*bench).memory,
	"stored":   (*bench).stored,
	"identity": (*bench).identity,
	"room":     (*bench).room,
	"answers":  (*bench).answers,
}

// bench is one process that measures.
type bench struct {
	Options
	ctx      context.Context
	measured []figures.Figure

	account *inputs.Person
	server  *inputs.Server
	*receiver.Receiver
}

func (b *bench) report(figure figures.Figure) {
	figure.Side, figure.Store = string(b.Side), string(b.Store)
	if figure.Stored == 0 {
		figure.Stored = b.Stored
	}
	b.measured = append(b.measured, figure)
}

// open makes a new receiver on a server where the people are, or opens it again.
func (b *bench) open(people ...*inputs.Person) { b.openFor(nil, people...) }

// openFor is open with a handler of messages.
func (b *bench) openFor(onMessage func(ctx context.Context, evt *event.Event), people ...*inputs.Person) {
	if b.server == nil {
		b.account = inputs.NewPerson(inputs.Receiver, 0)
		b.server = inputs.NewServer(b.account, people...)
	}
	b.start(onMessage)
	inputs.Check(b.Learn(b.ctx, append([]*inputs.Person{b.account}, people...)...))
	b.Settle()
}

// start opens the receiver, which begins to sync.
func (b *bench) start(onMessage func(ctx context.Context, evt *event.Event)) {
	b.Receiver = inputs.Must(receiver.Open(b.ctx, receiver.Options{
		Side: b.Side, Store: b.Store, At: b.At, Account: b.account, Server: b.server, OnMessage: onMessage,
	}))
}

func (b *bench) close() { inputs.Check(b.Close()) }

// measure times a work, and profiles it if that is wanted.
func (b *bench) measure(work string, count int, do func()) figures.Figure {
	t := b.newTally(work)
	t.add(count, do)
	return t.stop()
}

// tally measures a work that is done in pieces.
type tally struct {
	meter
	work  string
	count int
	// profile is where the CPU profile goes, heap where the one of the memory in use goes; empty for none.
	profile *os.File
	heap    string
}

// newTally begins the profile of a work, if that is wanted: what happens between the pieces is in it.
func (b *bench) newTally(work string) *tally {
	t := &tally{work: work, meter: newMeter()}
	if b.Profiles != "" {
		name := filepath.Join(b.Profiles, fmt.Sprintf("%s-%s-%s", b.Side, b.Store, work))
		t.profile, t.heap = inputs.Must(os.Create(name+".pprof")), name+"-heap.pprof"
		inputs.Check(pprof.StartCPUProfile(t.profile))
	}
	return t
}

func (t *tally) add(count int, do func()) {
	t.count += count
	t.begin()
	do()
	t.end()
}

func (t *tally) stop() figures.Figure {
	if t.profile != nil {
		pprof.StopCPUProfile()
		inputs.Check(t.profile.Close())
		heap := inputs.Must(os.Create(t.heap))
		inputs.Check(pprof.WriteHeapProfile(heap))
		inputs.Check(heap.Close())
	}
	return t.figure(t.work, t.count)
}

// greetedDevices gives one device of each of so many people, each with an Olm session by which it was answered. The Olm sessions are
// begun in batches, each with a new lot of one-time keys.
func (b *bench) greetedDevices(people []*inputs.Person) []*inputs.Device {
	devices := make([]*inputs.Device, len(people))
	for i, p := range people {
		devices[i] = p.Devices[0]
	}
	room := id.RoomID("!first:bench")
	b.meet(devices, func(met []*inputs.Device) {
		b.server.Sync(b.shareAll(met, room), nil, "")
		for _, device := range met {
			inputs.Check(b.Greet(b.ctx, device))
		}
	})
	return devices
}

// meet has the devices begin Olm sessions, as many at a time as there are one-time keys for.
func (b *bench) meet(devices []*inputs.Device, then func(met []*inputs.Device)) {
	for len(devices) > 0 {
		if b.server.Left() == 0 {
			inputs.Check(b.Machine.ShareKeys(b.ctx, 0))
		}
		met := devices[:min(b.server.Left(), len(devices))]
		devices = devices[len(met):]
		for _, device := range met {
			device.Meet(b.Own(), b.server.Claim())
		}
		then(met)
	}
}

// shareAll has each device share a new session for the room.
func (b *bench) shareAll(devices []*inputs.Device, room id.RoomID) []json.RawMessage {
	events := make([]json.RawMessage, len(devices))
	for i, device := range devices {
		events[i] = device.ShareKey(b.Own(), device.NewSession(room))
	}
	return events
}

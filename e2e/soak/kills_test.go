package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
)

// faultPoints are the moments at which the bot dies when it is asked to: see package faultpoint. In the order in which a message comes
// to them: received, committed, judged, answered.
var faultPoints = []string{
	"decrypted", "received", "begun", "account", "ratchets", "written", "committed", "synced",
	"judged", "sending keys", "sent keys", "answering", "answered", "handled", "learnt",
}

const (
	// longestLife is how long a bot lives at most that is killed at a random moment; it takes about a third of it to get to work.
	longestLife = 1200 * time.Millisecond
	// pointPatience is how long a bot may take to come to a fault point. Then it is killed where it is.
	pointPatience = 8 * time.Second
	// mostMissed is for how many points that a bot did not come to it gets another try.
	mostMissed = 10
	// mostPasses is how often it comes there at most before it dies. There are more room keys than anything else.
	mostPasses   = 3
	mostRoomKeys = 30
	// unanswered is how many messages a person sends before the answers to the first of them have to be there.
	unanswered = 20
	// lostPatience is how long an answer may take where many are known to be lost.
	lostPatience = 15 * time.Second
)

// victim is a bot that is killed again and again.
type victim struct {
	*botproc.Bot
	name string
	// randomly and atPoints count the kills, missed those fault points that the bot did not come to.
	randomly int
	atPoints map[string]int
	missed   int
	peak     int64
	err      error
}

// death is one way to die: at a point, or at a random moment.
type death struct{ point string }

func deaths(randomly, atEachPoint int, points []string) (all []death) {
	for range randomly {
		all = append(all, death{})
	}
	for _, point := range points {
		for range atEachPoint {
			all = append(all, death{point})
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// die kills the bot in all these ways, and leaves it running.
func (v *victim) die(ctx context.Context, ways []death) {
	for i := 0; i < len(ways); i++ {
		way := ways[i]
		v.end()
		var env []string
		life := time.Duration(rand.Int64N(int64(longestLife)))
		if way.point != "" {
			passes := mostPasses
			if way.point == "decrypted" {
				passes = mostRoomKeys
			}
			env, life = []string{fmt.Sprintf("FAULTPOINT=%s:%d", way.point, 1+rand.IntN(passes))}, pointPatience
		}
		if v.err = v.Launch(env...); v.err != nil {
			return
		}
		timer := time.NewTimer(life)
		select {
		case <-v.Exited():
			if v.ExitCode() != -1 {
				v.err = fmt.Errorf("the bot has ended by itself, with %d:\n%s", v.ExitCode(), v.Tail(20))
				return
			}
			v.atPoints[way.point]++
		case <-timer.C:
			if way.point == "" {
				v.randomly++
			} else if v.missed++; v.missed <= mostMissed {
				ways = append(ways, way) // there was nothing to do that leads there; later there may be
			}
		case <-ctx.Done():
			v.err = context.Cause(ctx)
			return
		}
		timer.Stop()
	}
	v.end()
	v.err = v.Restart(ctx)
}

// end kills the bot, and notes what memory it had.
func (v *victim) end() {
	if peak, err := v.PeakRSS(); err == nil {
		v.peak = max(v.peak, peak)
	}
	v.Kill()
}

// crowd is five people who talk to bots: four with a room of their own for each, and one who uses Element; all share a room.
type crowd struct {
	t      *testing.T
	w      *world
	ledger ledger
	bots   []id.UserID
	// verified has the code verified, by the bots' configuration; unsigned has no identity.
	verified, unsigned *people.Person
	strangers          []*people.Person
	element            *element.Client
	shared             id.RoomID
	rooms              map[*people.Person]id.RoomID
	fresh              atomic.Int64
	// patience is how long an answer may take before it counts as lost.
	patience time.Duration
}

func newCrowd(t *testing.T, w *world, withElement bool) *crowd {
	c := &crowd{t: t, w: w, patience: patience, rooms: make(map[*people.Person]id.RoomID)}
	c.verified, c.unsigned = w.newPerson(t, "verified"), w.newPerson(t, "unsigned")
	c.strangers = []*people.Person{w.newStranger(t, "alice"), w.newStranger(t, "bob")}
	if withElement {
		c.element = w.newElement(t, "element")
	}
	return c
}

// pin has a bot hold the verified person for verified.
func (c *crowd) pin() func(botproc.Config) {
	masterKey := must(c.verified.BootstrapCrossSigning(within(c.t, patience)))(c.t)
	return func(config botproc.Config) {
		config["trust"] = botproc.Config{"verified_users": botproc.Config{c.verified.UserID.String(): masterKey.String()}}
	}
}

func (c *crowd) persons() []*people.Person {
	return slices.Concat([]*people.Person{c.verified, c.unsigned}, c.strangers)
}

func (c *crowd) codeOf(person *people.Person) string {
	switch person {
	case c.verified:
		return "verified"
	case c.unsigned:
		return "unsigned_device"
	}
	return "unverified_identity"
}

// meet brings the people and the bots into their rooms.
func (c *crowd) meet(bots ...id.UserID) {
	c.bots = bots
	ctx := within(c.t, patience)
	host := c.strangers[0]
	guests := slices.Clone(bots)
	for _, person := range c.persons() {
		c.rooms[person] = c.w.newRoom(c.t, person, bots...)
		if person != host {
			guests = append(guests, person.UserID)
		}
	}
	if c.element != nil {
		guests = append(guests, c.element.UserID())
	}
	c.shared = c.w.newRoom(c.t, host, guests...)
	for _, person := range c.persons() {
		if person != host {
			ok(c.t, person.Join(ctx, c.shared))
		}
	}
	if c.element != nil {
		ok(c.t, c.element.Join(ctx, c.shared))
		ok(c.t, c.element.WaitForEncryption(ctx, c.shared))
	}
	for _, person := range c.persons() {
		for _, bot := range bots {
			ok(c.t, person.WaitJoined(ctx, c.rooms[person], bot))
		}
		for _, guest := range guests {
			ok(c.t, person.WaitJoined(ctx, c.shared, guest))
		}
	}
}

// talk has everybody write until they have written so many messages, and the others are done. Half of the messages have a session of
// their own.
func (c *crowd) talk(ctx context.Context, messages int, othersDone <-chan struct{}) error {
	var begun atomic.Int64
	more := func() bool {
		if ctx.Err() != nil {
			return false
		}
		if begun.Add(1) <= int64(messages) {
			return true
		}
		select {
		case <-othersDone:
			return false
		default:
			return true
		}
	}
	var talking sync.WaitGroup
	var failed sync.Map
	talk := func(name string, reader *people.Person, code string, send func(n int) (id.RoomID, id.EventID, error)) {
		talking.Go(func() {
			var mine []message
			for n := 0; more(); n++ {
				m := message{reader: reader, code: code, sent: time.Now()}
				var err error
				if m.roomID, m.eventID, err = send(n); err != nil {
					failed.Store(name, fmt.Errorf("%s failed to write: %w", name, err))
					return
				}
				c.ledger.note(m)
				if mine = append(mine, m); len(mine) > unanswered {
					c.awaitAnswers(ctx, mine[len(mine)-1-unanswered])
				}
			}
		})
	}
	for _, person := range c.persons() {
		talk(person.UserID.String(), person, c.codeOf(person), func(n int) (id.RoomID, id.EventID, error) {
			room := c.rooms[person]
			if n%5 == 4 {
				room = c.shared
			}
			if n/5%2 == 0 {
				person.RotateSession(room)
				c.fresh.Add(1)
			}
			eventID, err := person.Send(ctx, room, say(fmt.Sprint("message ", n)))
			return room, eventID, err
		})
	}
	if c.element != nil {
		talk("Element", c.strangers[0], "unverified_identity", func(n int) (id.RoomID, id.EventID, error) {
			if n%2 == 0 {
				if err := c.element.ForceDiscardSession(ctx, c.shared); err != nil {
					return "", "", err
				}
				c.fresh.Add(1)
			}
			eventID, err := c.element.Send(ctx, c.shared, say(fmt.Sprint("message ", n)))
			return c.shared, eventID, err
		})
	}
	talking.Wait()
	var faults []error
	failed.Range(func(_, fault any) bool { faults = append(faults, fault.(error)); return true })
	return errors.Join(faults...)
}

// awaitAnswers waits until the bots have answered a message. What stays unanswered for long is lost, and holds nobody up.
func (c *crowd) awaitAnswers(ctx context.Context, m message) {
	ctx, cancel := context.WithTimeout(ctx, c.patience)
	defer cancel()
	for _, bot := range c.bots {
		_, _ = m.reader.WaitForAnswerThat(ctx, m.eventID, func(answer people.Answer) bool { return answer.Sender == bot })
	}
}

// play has the crowd talk while the victims die, and gives a line for each victim.
func (c *crowd) play(messages, randomly, atEachPoint int, points []string, victims ...*victim) []result {
	t := c.t
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dead := make(chan struct{})
	var dying sync.WaitGroup
	for _, v := range victims {
		v.atPoints = make(map[string]int)
		dying.Go(func() {
			if v.die(ctx, deaths(randomly, atEachPoint, points)); v.err != nil {
				cancel() // without its answers, the others would only wait
			}
		})
	}
	go func() {
		dying.Wait()
		close(dead)
	}()
	err := c.talk(ctx, messages, dead)
	<-dead
	for _, v := range victims {
		ok(t, v.err)
	}
	ok(t, err)
	var lines []result
	for _, v := range victims {
		r := result{part: "kills", what: v.name, tries: v.randomly}
		c.ledger.await(within(t, c.patience), v.UserID)
		c.ledger.settle(within(t, c.patience), t, v.UserID, c.codeOf)
		for _, count := range v.atPoints {
			r.tries += count
		}
		c.ledger.count(t, v.UserID, &r)
		v.end()
		ok(t, v.Restart(within(t, patience)))
		r.peak = v.peak
		r.note = fmt.Sprintf("%d of the kills at random, the others at %d points; %d fresh sessions", v.randomly, len(v.atPoints), c.fresh.Load())
		for _, point := range points {
			if atEachPoint > 0 && v.atPoints[point] == 0 {
				t.Errorf("%s never died at %q", v.name, point)
			}
		}
		lines = append(lines, r)
	}
	return lines
}

// The bot is killed at random moments, and at those at which it hurts most, while people talk; once with a file for its database, and
// once with PostgreSQL.
func TestKills(t *testing.T) {
	w := theWorld(t)
	binary := w.binary
	if *without != "" {
		binary = w.buildWithout(t, *without)
	}
	c := newCrowd(t, w, true)
	if *without != "" {
		c.patience = lostPatience
	}
	pin := c.pin()
	var victims []*victim
	for _, name := range []string{"SQLite", "PostgreSQL"} {
		bot := w.newBot(t, botOptions{binary: binary, postgres: name == "PostgreSQL", configure: pin})
		victims = append(victims, &victim{Bot: bot, name: name})
	}
	c.meet(victims[0].UserID, victims[1].UserID)
	begun := time.Now()
	for _, line := range c.play(often(120, 5000), often(10, 200), often(1, 20), faultPoints, victims...) {
		check(t, line)
	}
	t.Logf("%d messages in %s", len(c.ledger.all()), time.Since(begun).Round(time.Second))
}

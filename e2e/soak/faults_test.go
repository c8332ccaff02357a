package soak

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

const (
	// mostSyncs and mostRequests are how often a bot may ask for news, and for anything, within a second while all of that fails: it must
	// not beat on a server that is down.
	mostSyncs, mostRequests = 2, 10
	// refusals are how many requests fail in a row when a homeserver is down for a moment, and longRefusals when it is for a while.
	refusals, longRefusals = 3, 4
)

// silence is how long a connection says nothing before it is closed.
func silence() time.Duration { return time.Duration(often(2, 30)) * time.Second }

// faulty is a bot behind a network and a homeserver that fail, and somebody who talks to it.
type faulty struct {
	*proxy.Proxy
	t      *testing.T
	bot    *botproc.Bot
	person *people.Person
	room   id.RoomID
	ledger ledger
	clock  string
}

func newFaulty(t *testing.T, w *world) *faulty {
	f := &faulty{Proxy: must(proxy.Start(w.server.URL))(t), t: t, person: w.newStranger(t, "alice")}
	t.Cleanup(f.Close)
	f.clock = filepath.Join(must(os.MkdirTemp(w.dir, "clock-"))(t), "offset")
	f.bot = w.newBot(t, botOptions{homeserver: f.URL, env: []string{"CLOCK_OFFSET_FILE=" + f.clock}})
	// A session for each answer, so that Olm messages are sent all the time.
	f.room = w.newRoomRotating(t, 1, f.person, f.bot.UserID)
	ok(t, f.person.WaitJoined(within(t, patience), f.room, f.bot.UserID))
	f.say()
	f.ledger.await(within(t, patience), f.bot.UserID)
	return f
}

// say has the person write a message; every second one has a session of its own.
func (f *faulty) say() {
	count := len(f.ledger.all())
	if count%2 == 0 {
		f.person.RotateSession(f.room)
	}
	f.note(must(f.person.Send(within(f.t, patience), f.room, say(fmt.Sprint("message ", count))))(f.t))
}

func (f *faulty) note(eventID id.EventID) {
	f.ledger.note(message{eventID: eventID, roomID: f.room, reader: f.person, code: "unverified_identity", sent: time.Now()})
}

// sayAndHear has the person write a message, and waits for its answer, whatever others wait for.
func (f *faulty) sayAndHear() {
	eventID := must(f.person.Send(within(f.t, patience), f.room, say("do you hear me?")))(f.t)
	f.note(eventID)
	must(f.person.WaitForAnswer(within(f.t, patience), eventID))(f.t)
}

// sayWithoutKey has the person write a message whose key is still to come: that of the session.
func (f *faulty) sayWithoutKey() *people.Session {
	eventID, session, err := f.person.SendWithoutKey(within(f.t, patience), f.room, say("wait for it"))
	ok(f.t, err)
	f.note(eventID)
	return session
}

// atWork are the requests of which the bot's work consists.
var atWork = []string{proxy.Sync, proxy.Send, proxy.SendToDevice}

// brings says that an answer has something in it that the bot must not lose.
func brings(pattern string, answer *proxy.Answer) bool {
	return answer.Status == 200 && (pattern != proxy.Sync || bytes.Contains(answer.Body, []byte(`"timeline"`)) || bytes.Contains(answer.Body, []byte(`"to_device"`)))
}

// spoil has one answer of the pattern spoilt.
func (f *faulty) spoil(pattern string, how func(*proxy.Answer)) *proxy.Hook {
	return f.OnAnswer(pattern, 1, func(_ *proxy.Request, answer *proxy.Answer) bool {
		if !brings(pattern, answer) {
			return false
		}
		how(answer)
		return true
	})
}

// refuse answers so many requests of the pattern in the homeserver's stead.
func (f *faulty) refuse(pattern string, times int, answer func() *proxy.Answer) *proxy.Hook {
	return f.OnRequest(pattern, times, func(*proxy.Request) *proxy.Answer { return answer() })
}

// wrongShapes are JSON that no such answer has.
var wrongShapes = []string{
	`[]`, `null`, `"text"`, `5`, `true`, `{}`, `{"next_batch": 5, "event_id": 5}`, `{"rooms": [], "next_batch": "x"}`, `{"rooms": {"join": {"!a": 1}}}`,
	`{"to_device": {"events": {}}, "event_id": null}`, `{"rooms": {"join": []}, "next_batch": ""}`, `{"device_lists": "all"}`, ``,
}

// faults are what goes wrong, by its name. The function brings the nth one about, and gives the hook that has done it then.
var faults = map[string]func(f *faulty, n int) *proxy.Hook{
	"connection cut": func(f *faulty, n int) *proxy.Hook {
		return f.spoil(atWork[n%len(atWork)], func(answer *proxy.Answer) { answer.Break(proxy.CutAt(rand.IntN(len(answer.Body) + 1))) })
	},
	"connection reset": func(f *faulty, n int) *proxy.Hook {
		return f.spoil(atWork[n%len(atWork)], func(answer *proxy.Answer) { answer.Break(proxy.Reset()) })
	},
	"silence": func(f *faulty, n int) *proxy.Hook {
		return f.spoil(atWork[n%len(atWork)], func(answer *proxy.Answer) { answer.Break(proxy.Silence(silence())) })
	},
	"slow bytes": func(f *faulty, n int) *proxy.Hook {
		cure, err := f.Poison(proxy.Slices(200, 2*time.Millisecond))
		ok(f.t, err)
		// What the slicer holds back when it is taken away is lost with its connection: that is a fault, too.
		return f.spoil(atWork[n%len(atWork)], func(*proxy.Answer) { time.AfterFunc(200*time.Millisecond, cure) })
	},
	"429": func(f *faulty, n int) *proxy.Hook {
		return f.refuse(atWork[n%len(atWork)], 1+n%2, func() *proxy.Answer {
			answer := proxy.JSON(429, map[string]any{"errcode": "M_LIMIT_EXCEEDED", "error": "Too many requests", "retry_after_ms": 300})
			if n%3 == 0 {
				answer = proxy.Error(429, "M_LIMIT_EXCEEDED", "Too many requests")
				answer.Header.Set("Retry-After", "1")
			}
			return answer
		})
	},
	"500": func(f *faulty, n int) *proxy.Hook {
		return f.refuse(atWork[n%len(atWork)], 1+n%2, func() *proxy.Answer { return proxy.Error(500, "M_UNKNOWN", "Internal server error") })
	},
	"502 with HTML, for all": func(f *faulty, _ int) *proxy.Hook {
		return f.refuse(proxy.Anything, refusals, func() *proxy.Answer { return proxy.Page(502) })
	},
	"200 with HTML": func(f *faulty, n int) *proxy.Hook {
		return f.refuse(atWork[n%len(atWork)], 1, func() *proxy.Answer { return proxy.Page(200) })
	},
	"truncated": func(f *faulty, n int) *proxy.Hook {
		return f.spoil(atWork[n%len(atWork)], func(answer *proxy.Answer) { answer.Body = answer.Body[:rand.IntN(len(answer.Body))] })
	},
	"lost after it was done": func(f *faulty, n int) *proxy.Hook {
		return f.spoil(atWork[n%len(atWork)], func(answer *proxy.Answer) { answer.Break(proxy.CutAt(0)) })
	},
	"repeated": func(f *faulty, _ int) *proxy.Hook {
		return f.Repeat(proxy.Sync, 1, func(answer *proxy.Answer) bool { return brings(proxy.Sync, answer) })
	},
	"wrong JSON": func(f *faulty, n int) *proxy.Hook {
		return f.spoil(atWork[n%len(atWork)], func(answer *proxy.Answer) { answer.Body = []byte(wrongShapes[n%len(wrongShapes)]) })
	},
	"token refused for a while": func(f *faulty, n int) *proxy.Hook {
		return f.refuse(atWork[n%len(atWork)], 1, func() *proxy.Answer {
			return proxy.JSON(401, map[string]any{"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown token", "soft_logout": n%2 == 0})
		})
	},
	// Every position is refused until the bot begins anew, as Synapse words it, too.
	"position unknown": func(f *faulty, n int) *proxy.Hook {
		anew := false
		return f.OnRequest(proxy.Sync, 0, func(r *proxy.Request) *proxy.Answer {
			if anew = anew || r.URL.Query().Get("since") == ""; anew {
				return nil
			}
			return proxy.Error(400, []string{"M_UNKNOWN_POS", "M_UNKNOWN"}[n%2], "Unknown position")
		})
	},
	// A message waits for its key meanwhile: not an hour longer, and not an hour less.
	"clock set by an hour": func(f *faulty, n int) *proxy.Hook {
		session := f.sayWithoutKey()
		f.sayAndHear()
		ok(f.t, os.WriteFile(f.clock, []byte([]string{"1h", "-1h", "0s"}[n%3]), 0o600))
		f.sayAndHear()
		ok(f.t, f.person.ShareKey(within(f.t, patience), session, f.bot.UserID))
		return f.OnAnswer(proxy.Send, 1, func(*proxy.Request, *proxy.Answer) bool { return true })
	},
}

// Whatever goes wrong between the bot and its homeserver, it goes on by itself, and answers each message once and rightly.
func TestFaults(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	for name, strike := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Silence is slow, so it is played in several places at once.
			places := 1
			if name == "silence" {
				places = often(1, 5)
			}
			tries := often(2, 20) / places
			line := result{part: "faults", what: name}
			var mu sync.Mutex
			t.Run("", func(t *testing.T) {
				for range places {
					t.Run("", func(t *testing.T) {
						t.Parallel()
						r := playFault(t, w, strike, tries)
						mu.Lock()
						defer mu.Unlock()
						line.tries, line.messages, line.held = line.tries+r.tries, line.messages+r.messages, line.held+r.held
						line.lost, line.doubled, line.wrong = line.lost+r.lost, line.doubled+r.doubled, line.wrong+r.wrong
						line.peak = max(line.peak, r.peak)
					})
				}
			})
			check(t, line)
		})
	}
}

// playFault brings a fault about again and again while somebody talks, each time waiting until the bot has answered all the same.
func playFault(t *testing.T, w *world, strike func(*faulty, int) *proxy.Hook, tries int) (r result) {
	f := newFaulty(t, w)
	for n := range tries {
		hook := strike(f, n)
		f.say()
		f.say()
		if err := hook.Wait(within(t, patience), 1); err != nil {
			t.Fatal(err)
		}
		f.say()
		f.ledger.await(within(t, patience), f.bot.UserID)
		r.tries++
	}
	f.ledger.settle(within(t, patience), t, f.bot.UserID, func(*people.Person) string { return "unverified_identity" })
	f.ledger.count(t, f.bot.UserID, &r)
	if !f.bot.Running() {
		t.Errorf("the bot has ended, with code %d", f.bot.ExitCode())
	}
	r.peak, _ = f.bot.PeakRSS()
	return r
}

// While everything fails, the bot asks again with growing pauses.
func TestServerThatIsDownIsNotBeatenOn(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, theWorld(t))
	begun := time.Now()
	syncs := f.refuse(proxy.Sync, longRefusals, func() *proxy.Answer { return proxy.Page(503) })
	others := f.refuse(proxy.Anything, 0, func() *proxy.Answer { return proxy.Page(503) })
	f.say()
	ok(t, syncs.Wait(within(t, patience), longRefusals))
	if most := f.MostWithin(time.Second, begun, proxy.Sync); most > mostSyncs {
		t.Errorf("%d requests for news within a second", most)
	}
	if most := f.MostWithin(time.Second, begun, proxy.Anything); most > mostRequests {
		t.Errorf("%d requests within a second", most)
	}
	others.Remove()
	f.ledger.await(within(t, patience), f.bot.UserID)
	r := result{part: "faults", what: "server down for a while", tries: 1}
	f.ledger.count(t, f.bot.UserID, &r)
	check(t, r)
}

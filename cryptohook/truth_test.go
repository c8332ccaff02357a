package cryptohook

import (
	"bytes"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// truthStory is one row of testdata/truth.yaml, which explains the words.
type truthStory struct {
	Name string   `yaml:"name"`
	Tell []string `yaml:"tell"`
}

// truthWorld is Alice with one device, and the session that it shares.
type truthWorld struct {
	*trustWorld
	alice   *actorDevice
	session *megolm
	pins    map[id.UserID]id.Ed25519
	// former are the keys that Alice had before the last change of them.
	formerMaster, formerSelfSigning olm.PKSigning
	formerVerifiedBy                *actor
	noSelfSigning                   bool
	// told are the verdicts that were given.
	told []Verdict
}

func newTruthWorld(t *testing.T) *truthWorld {
	w := &truthWorld{pins: make(map[id.UserID]id.Ed25519), session: newMegolm(trustRoom)}
	w.trustWorld = newTrustWorld(t, func(o *Options) { o.VerifiedUsers = w.pins })
	w.alice = w.server.add(newActor("@alice:test")).addDevice("ALICE")
	w.server.forge = func(answer object) {
		if w.noSelfSigning {
			delete(answer["self_signing_keys"].(object), "@alice:test")
		}
	}
	return w
}

func (w *truthWorld) restartWithPins(change func()) {
	change()
	w.restart()
	if err := w.hook.resolver.begin(w.ctx); err != nil {
		w.t.Fatal(err)
	}
}

// happenings are the words of the stories.
var happenings = map[string]func(w *truthWorld){
	"share": func(w *truthWorld) { w.sync(syncPart{toDevice: []object{w.share(w.alice, w.session)}}) },
	"share_bare": func(w *truthWorld) {
		w.sync(syncPart{toDevice: []object{w.share(w.alice, w.session, withoutDeviceKeys)}})
	},
	"share_crowded": func(w *truthWorld) {
		keys := w.alice.keys()
		for i := range maxSigners {
			// '+' comes before everything else in a key.
			putSignature(keys, "@alice:test", strings.Repeat("+", 42)+string(rune('A'+i)), forgedSignature())
		}
		w.sync(syncPart{toDevice: []object{w.share(w.alice, w.session, embedding(keys))}})
	},
	"share_another": func(w *truthWorld) { w.sync(syncPart{toDevice: []object{w.share(w.alice, newMegolm(trustRoom))}}) },
	"signed":        func(w *truthWorld) { w.alice.crossSigned = true },
	"unsigned":      func(w *truthWorld) { w.alice.crossSigned = false },
	"deleted":       func(w *truthWorld) { w.alice.unpublished = true },
	"undeleted":     func(w *truthWorld) { w.alice.unpublished = false },
	"published":     func(w *truthWorld) { w.alice.owner.hidden = false },
	"hidden":        func(w *truthWorld) { w.alice.owner.hidden = true },
	"no_ssk":        func(w *truthWorld) { w.noSelfSigning = true },
	"ssk":           func(w *truthWorld) { w.noSelfSigning = false },
	"reset": func(w *truthWorld) {
		w.formerMaster, w.formerSelfSigning, w.formerVerifiedBy = w.alice.owner.master, w.alice.owner.selfSigning, w.alice.owner.verifiedBy
		w.alice.owner.reset()
	},
	"reset_back": func(w *truthWorld) {
		w.alice.owner.master, w.alice.owner.selfSigning, w.alice.owner.verifiedBy = w.formerMaster, w.formerSelfSigning, w.formerVerifiedBy
	},
	"rotated": func(w *truthWorld) {
		w.formerSelfSigning, w.alice.owner.selfSigning = w.alice.owner.selfSigning, must(olm.NewPKSigning())
	},
	"rotated_back": func(w *truthWorld) { w.alice.owner.selfSigning = w.formerSelfSigning },
	"away":         func(w *truthWorld) { delete(w.server.actors, "@alice:test") },
	"there":        func(w *truthWorld) { w.server.add(w.alice.owner) },
	"signed_by_us": func(w *truthWorld) { w.alice.owner.verifiedBy = w.bot },
	"verify": func(w *truthWorld) {
		if err := w.hook.Verify(w.ctx, "@alice:test", w.alice.owner.masterKey()); err != nil {
			w.t.Fatal(err)
		}
	},
	"withdraw": func(w *truthWorld) {
		if err := w.hook.WithdrawVerification(w.ctx, "@alice:test"); err != nil {
			w.t.Fatal(err)
		}
	},
	"pin":     func(w *truthWorld) { w.restartWithPins(func() { w.pins["@alice:test"] = w.alice.owner.masterKey() }) },
	"unpin":   func(w *truthWorld) { w.restartWithPins(func() { delete(w.pins, "@alice:test") }) },
	"restart": func(w *truthWorld) { w.restartWithPins(func() {}) },
	"changed": func(w *truthWorld) {
		// What the bot does not share a room with is not tracked; Alice is.
		if must(w.hook.store.identity(w.ctx, "@alice:test")) == nil {
			w.hook.resolver.ask("@alice:test")
		}
		w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
		w.resolve()
	},
	"query": func(w *truthWorld) {
		if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
			w.t.Fatal(err)
		}
		if _, err := w.hook.resolver.judgeAnswered(w.ctx); err != nil {
			w.t.Fatal(err)
		}
	},
	"due": func(w *truthWorld) {
		row := w.row(w.session, w.alice)
		if row.NextRetry.IsZero() {
			w.t.Fatal("nothing is scheduled")
		}
		asked := w.server.count("keys/query")
		w.clock.advance(row.NextRetry.Sub(w.clock.Now()))
		w.resolve()
		if w.server.count("keys/query") == asked {
			w.t.Error("the schedule did not ask")
		}
	},
	"resolve": func(w *truthWorld) { w.resolve() },
	"down":    func(w *truthWorld) { w.server.down = true },
	"up":      func(w *truthWorld) { w.server.down = false },
}

func TestEveryStoryOfTheTruth(t *testing.T) {
	var stories []truthStory
	decoder := yaml.NewDecoder(bytes.NewReader(must(os.ReadFile("testdata/truth.yaml"))))
	decoder.KnownFields(true)
	if err := decoder.Decode(&stories); err != nil {
		t.Fatal(err)
	}
	told := make(map[string]bool)
	for _, story := range stories {
		for _, word := range story.Tell {
			told[word] = true
		}
		t.Run(story.Name, func(t *testing.T) { newTruthWorld(t).tell(story.Tell) })
	}
	for _, word := range slices.Sorted(maps.Keys(happenings)) {
		if !told[word] {
			t.Errorf("no story tells %q", word)
		}
	}
}

func (w *truthWorld) tell(words []string) {
	w.t.Helper()
	var before State
	for i, word := range words {
		if want, expected := strings.CutPrefix(word, "= "); expected {
			before = w.expect(strings.Join(words[:i+1], ", "), before, want)
			continue
		}
		happen := happenings[word]
		if happen == nil {
			w.t.Fatalf("nobody knows what %q is", word)
		}
		happen(w)
	}
}

// expect compares what the row and a message are worth, and sees that whoever has told it before was told of a change.
func (w *truthWorld) expect(when string, before State, want string) State {
	w.t.Helper()
	state, code, judged := strings.Cut(want, " ")
	row := w.row(w.session, w.alice)
	if row.State != State(state) {
		w.t.Errorf("%s: state %s, want %s", when, row.State, state)
	}
	sessions, users := w.changes.take()
	if before != "" && before != row.State && !sessions[w.session.id()] && !users["@alice:test"] {
		w.t.Errorf("%s: nobody was told that %s has become %s", when, before, row.State)
	}
	if !judged {
		return row.State
	}
	// A verdict waits for what is on its way; nothing is here, or it takes too long.
	evt := w.say(w.alice, w.session, "hello")
	w.sync(syncPart{timeline: []object{evt}})
	w.handle()
	if !w.saw(evt["event_id"]) {
		w.clock.advance(longestIdentityWait + time.Millisecond)
		w.handle()
	}
	seen := w.sawOne(id.EventID(evt["event_id"].(string)))
	if seen.verdict.Code != Code(code) {
		w.t.Errorf("%s: code %s, want %s", when, seen.verdict.Code, code)
	}
	w.examineAsWell(when, evt, seen.verdict)
	w.review(when, seen.verdict)
	return row.State
}

// review sees that messages of before are worth what one of now is.
func (w *truthWorld) review(when string, now Verdict) {
	w.t.Helper()
	for _, told := range w.told {
		want := now
		want.EventID, want.Outdated = told.EventID, told.Outdated && now.Outdated
		if got := must(w.hook.Review(w.ctx, told, "@alice:test")); !reflect.DeepEqual(got, want) {
			w.t.Errorf("%s: a message of before is worth %+v, want %+v", when, got, want)
		}
	}
	w.told = append(w.told, now)
}

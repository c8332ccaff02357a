package cryptohook

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// ownAnswer is the part of a key query's answer that is about ourselves.
type ownAnswer struct {
	w      *trustWorld
	answer object
}

func (a ownAnswer) devices() object { return a.answer["device_keys"].(object)["@bot:test"].(object) }
func (a ownAnswer) device() *actorDevice {
	return a.w.bot.devices[0]
}

// publish puts a cross-signing key in the place of ours.
func (a ownAnswer) publish(field string, key any) { a.answer[field].(object)["@bot:test"] = key }

func (a ownAnswer) publishDevice(keys object) { a.devices()["BOTDEVICE"] = keys }

// What the server may say about ourselves, and what we make of it.
var ownCases = []struct {
	name  string
	forge func(a ownAnswer)
	want  OwnState
}{
	{"everything as it is", func(ownAnswer) {}, OwnFine},
	{"another device of the account, signed by our identity", func(a ownAnswer) {
		a.devices()["SECOND"] = (&actorDevice{owner: a.w.bot, deviceID: "SECOND", account: crypto.NewOlmAccount(), crossSigned: true}).keys()
	}, OwnFine},
	{"another device of the account, signed by nobody", func(a ownAnswer) {
		a.devices()["SECOND"] = (&actorDevice{owner: a.w.bot, deviceID: "SECOND", account: crypto.NewOlmAccount()}).keys()
	}, OwnFine},
	{"our user-signing key", func(a ownAnswer) {
		a.answer["user_signing_keys"] = object{"@bot:test": crossSigningObject(a.w.bot.userID, id.XSUsageUserSigning, a.w.bot.userSigning.PublicKey())}
	}, OwnFine},
	{"more signatures on our device", func(a ownAnswer) {
		keys := a.device().keys()
		putSignature(keys, a.w.bot.userID, "AnotherKey", forgedSignature())
		a.publishDevice(keys)
	}, OwnFine},
	{"our homeserver could not answer", func(a ownAnswer) {
		a.answer["failures"], a.answer["device_keys"] = object{"test": object{}}, object{}
	}, OwnUnknown},
	{"our device is not listed", func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") }, OwnDeviceMissing},
	{"no device is listed", func(a ownAnswer) { a.answer["device_keys"].(object)["@bot:test"] = object{} }, OwnDeviceMissing},
	{"we are left out", func(a ownAnswer) { delete(a.answer["device_keys"].(object), "@bot:test") }, OwnDeviceMissing},
	{"another device under our ID", func(a ownAnswer) {
		a.publishDevice((&actorDevice{owner: a.w.bot, deviceID: "BOTDEVICE", account: crypto.NewOlmAccount(), crossSigned: true}).keys())
	}, OwnDeviceChanged},
	{"another curve25519 key", func(a ownAnswer) {
		// Signed again, as only we could do it: then another program has our keys.
		keys := a.device().selfSignedKeys()
		delete(keys, "signatures")
		keys["keys"].(object)["curve25519:BOTDEVICE"] = crypto.NewOlmAccount().IdentityKey().String()
		signInto(keys, a.w.bot.userID, "BOTDEVICE", a.device().account)
		signInto(keys, a.w.bot.userID, a.w.bot.selfSigningKey().String(), a.w.bot.selfSigning)
		a.publishDevice(keys)
	}, OwnDeviceChanged},
	{"our device without its own signature", func(a ownAnswer) {
		keys := a.device().selfSignedKeys()
		delete(keys, "signatures")
		a.publishDevice(keys)
	}, OwnDeviceChanged},
	{"nothing in the place of our device", func(a ownAnswer) { a.publishDevice(object{}) }, OwnDeviceChanged},
	{"our device unsigned", func(a ownAnswer) { a.publishDevice(a.device().selfSignedKeys()) }, OwnSignatureMissing},
	{"a forged signature on our device", func(a ownAnswer) { a.publishDevice(a.device().forgedKeys()) }, OwnSignatureMissing},
	{"no identity", func(a ownAnswer) {
		a.answer["master_keys"], a.answer["self_signing_keys"] = object{}, object{}
	}, OwnSignatureMissing},
	{"no self-signing key", func(a ownAnswer) { a.answer["self_signing_keys"] = object{} }, OwnSignatureMissing},
	{"our self-signing key, signed by nobody", func(a ownAnswer) {
		a.publish("self_signing_keys", crossSigningObject(a.w.bot.userID, id.XSUsageSelfSigning, a.w.bot.selfSigningKey()))
	}, OwnSignatureMissing},
	{"a master key that is none", func(a ownAnswer) {
		a.publish("master_keys", crossSigningObject(a.w.bot.userID, id.XSUsageMaster, "short"))
	}, OwnSignatureMissing},
	{"another identity, that vouches for our device", func(a ownAnswer) {
		other := newActor(a.w.bot.userID)
		keys := a.device().selfSignedKeys()
		signInto(keys, other.userID, other.selfSigningKey().String(), other.selfSigning)
		a.publishDevice(keys)
		a.publish("master_keys", other.masterObject())
		a.publish("self_signing_keys", other.selfSigningObject())
	}, OwnOtherIdentity},
	{"another identity, and our device gone", func(a ownAnswer) {
		other := newActor(a.w.bot.userID)
		delete(a.devices(), "BOTDEVICE")
		a.publish("master_keys", other.masterObject())
		a.publish("self_signing_keys", other.selfSigningObject())
	}, OwnOtherIdentity},
	{"another master key alone", func(a ownAnswer) { a.publish("master_keys", newActor(a.w.bot.userID).masterObject()) }, OwnOtherIdentity},
	{"another self-signing key, signed by our master key", func(a ownAnswer) {
		fresh := must(olm.NewPKSigning())
		key := crossSigningObject(a.w.bot.userID, id.XSUsageSelfSigning, fresh.PublicKey())
		signInto(key, a.w.bot.userID, a.w.bot.masterKey().String(), a.w.bot.master)
		a.publish("self_signing_keys", key)
		keys := a.device().keys()
		signInto(keys, a.w.bot.userID, fresh.PublicKey().String(), fresh)
		a.publishDevice(keys)
	}, OwnOtherIdentity},
	{"another user-signing key", func(a ownAnswer) {
		a.answer["user_signing_keys"] = object{"@bot:test": crossSigningObject(a.w.bot.userID, id.XSUsageUserSigning, newActor("@bot:test").userSigning.PublicKey())}
	}, OwnOtherIdentity},
}

func (w *trustWorld) watch() (told *[]OwnIdentity) {
	told = new([]OwnIdentity)
	w.hook.options.OnOwnIdentity = func(own OwnIdentity) { *told = append(*told, own) }
	w.hook.own.begin(w.clock.Now())
	return told
}

// publishes has the server answer so from now on.
func (w *trustWorld) publishes(forge func(a ownAnswer)) {
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	w.server.forge = func(answer object) { forge(ownAnswer{w, answer}) }
}

func TestOwnIdentityIsJudgedByWhatTheServerPublishes(t *testing.T) {
	for _, test := range ownCases {
		t.Run(test.name, func(t *testing.T) {
			w := newTrustWorld(t)
			told := w.watch()
			w.publishes(test.forge)
			w.know(w.bot)
			own := w.hook.OwnIdentity()
			if own.State != test.want {
				t.Errorf("state %s, want %s", own.State, test.want)
			}
			if trusted := test.want == OwnFine || test.want == OwnUnknown; own.Trusted() != trusted {
				t.Errorf("trusted: %v", own.Trusted())
			}
			alarmed := strings.Contains(w.log.String(), `"level":"error"`) && strings.Contains(w.log.String(), "What the homeserver publishes about this account")
			if alarmed == own.Trusted() {
				t.Errorf("alarmed: %v", alarmed)
			}
			if test.want != OwnUnknown && (len(*told) != 1 || (*told)[0] != own) {
				t.Errorf("told %+v", *told)
			}
			// An honest answer ends it.
			w.publishes(func(ownAnswer) {})
			w.know(w.bot)
			if now := w.hook.OwnIdentity(); now.State != OwnFine || now.PublishedMasterKey != w.bot.masterKey() || now.MasterKey != w.bot.masterKey() {
				t.Errorf("afterwards %+v", now)
			}
		})
	}
}

// Another identity of ours says nothing about others: what they were verified by are keys that we hold.
func TestOtherIdentityOfOursChangesNoVerdictOnOthers(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.watch()
	alice.owner.verifiedBy = w.bot
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.publishes(func(a ownAnswer) {
		if _, about := a.answer["master_keys"].(object)["@bot:test"]; about {
			other := newActor(w.bot.userID)
			a.publish("master_keys", other.masterObject())
			a.publish("self_signing_keys", other.selfSigningObject())
		}
	})
	w.know(w.bot)
	if state := w.hook.OwnIdentity().State; state != OwnOtherIdentity {
		t.Errorf("state %s", state)
	}
	w.know(alice.owner)
	wantCode(t, w.judgeNow(w.say(alice, s, "still me")), CodeVerified)
}

func TestOwnIdentityIsNotJudgedBeforeItIsWatched(t *testing.T) {
	w := newTrustWorld(t)
	w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
	w.know(w.bot)
	if own := w.hook.OwnIdentity(); own.State != OwnUnknown {
		t.Errorf("%+v", own)
	}
}

// Who has no identity of their own is watched for their device alone.
func TestAccountWithoutIdentityIsWatchedForItsDevice(t *testing.T) {
	w := newTrustWorld(t)
	w.hook.mach.CrossSigningKeys = nil
	w.watch()
	w.publishes(func(a ownAnswer) { a.publishDevice(a.device().selfSignedKeys()) })
	w.know(w.bot)
	if state := w.hook.OwnIdentity().State; state != OwnFine {
		t.Errorf("state %s", state)
	}
	w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
	w.know(w.bot)
	if state := w.hook.OwnIdentity().State; state != OwnDeviceMissing {
		t.Errorf("state %s", state)
	}
}

// Only an answer to the question for all our devices says that one is missing.
func TestAnswerAboutOneOwnDeviceSaysNothingOfTheOthers(t *testing.T) {
	w := newTrustWorld(t)
	w.watch()
	w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
	_, err := w.client.QueryKeys(w.ctx, &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{w.bot.userID: {"SECOND"}}})
	if err != nil {
		t.Fatal(err)
	}
	if own := w.hook.OwnIdentity(); own.State != OwnUnknown {
		t.Errorf("%+v", own)
	}
}

// Two questions are under way, and the answer to the first one comes last.
func TestOvertakenAnswerAboutOurselvesIsIgnored(t *testing.T) {
	w := newTrustWorld(t)
	w.watch()
	late := &lateServer{RoundTripper: w.server, answered: make(chan struct{}), go_: make(chan struct{})}
	w.hook.transport.base = late
	ask := func() {
		if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{w.bot.userID}, true); err != nil {
			t.Error(err)
		}
	}
	w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
	first := make(chan struct{})
	go func() { defer close(first); ask() }()
	<-late.answered
	w.publishes(func(ownAnswer) {})
	w.hook.transport.base = w.server
	ask()
	close(late.go_)
	<-first
	if state := w.hook.OwnIdentity().State; state != OwnFine {
		t.Errorf("state %s", state)
	}
}

func TestOwnStateKeepsSinceWhenItHolds(t *testing.T) {
	w := newTrustWorld(t)
	told := w.watch()
	began := w.clock.Now()
	w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
	w.know(w.bot)
	w.clock.advance(time.Minute)
	w.know(w.bot)
	own := w.hook.OwnIdentity()
	if !own.Since.Equal(began) || !own.CheckedAt.Equal(began.Add(time.Minute)) {
		t.Errorf("%+v", own)
	}
	if len(*told) != 1 {
		t.Errorf("told %d times", len(*told))
	}
}

// We are asked for when our device list changes, and after the server was away.
func TestOwnKeysAreAskedForWhenSomethingMayHaveHappened(t *testing.T) {
	for name, happens := range map[string]func(w *trustWorld){
		"our device list changes": func(w *trustWorld) { w.sync(syncPart{changed: []id.UserID{w.bot.userID}}) },
		"the server is back": func(w *trustWorld) {
			if _, err := w.hook.syncer.OnFailedSync(nil, http.ErrServerClosed); err != nil {
				t.Fatal(err)
			}
			w.sync(syncPart{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTrustWorld(t)
			w.watch()
			w.know(w.bot)
			w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
			w.sync(syncPart{})
			w.resolve()
			if state := w.hook.OwnIdentity().State; state != OwnFine {
				t.Fatalf("state %s before it happens", state)
			}
			happens(w)
			w.resolve()
			if state := w.hook.OwnIdentity().State; state != OwnDeviceMissing {
				t.Errorf("state %s", state)
			}
		})
	}
}

// The schedule: every ten minutes, and every five seconds while something is wrong. A clock that jumps does not end it.
func TestOwnKeysAreAskedForOnSchedule(t *testing.T) {
	var w ownWatch
	now := time.UnixMilli(1_700_000_000_000)
	if w.due(now.Add(time.Hour)) {
		t.Error("asks before it watches")
	}
	w.begin(now)
	at := func(d time.Duration) bool { return w.due(now.Add(d)) }
	if at(ownEvery-time.Second) || !at(ownEvery) || at(ownEvery+time.Second) {
		t.Error("not every ten minutes")
	}
	if at(-time.Hour) || !at(-time.Hour+ownEvery) {
		t.Error("a clock that is set back has it wait too long, or not at all")
	}
	w.note(OwnIdentity{State: OwnDeviceMissing}, now)
	if at(ownSuspectedEvery-time.Second) || !at(ownSuspectedEvery) {
		t.Error("not every five seconds while something is wrong")
	}
}

func TestResolverAsksForOurOwnKeysOnSchedule(t *testing.T) {
	w := newTrustWorld(t)
	w.know(w.bot)
	w.watch()
	asks := func() (asked int) {
		before := w.server.count("keys/query")
		if err := w.hook.resolver.round(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.hook.resolver.queries.Wait()
		return w.server.count("keys/query") - before
	}
	if asked := asks(); asked != 0 {
		t.Errorf("asked %d times before it was due", asked)
	}
	w.clock.advance(ownEvery)
	if asked := asks(); asked != 1 || w.hook.OwnIdentity().State != OwnFine {
		t.Errorf("asked %d times when it was due: %+v", asked, w.hook.OwnIdentity())
	}
	if next := w.hook.resolver.untilNext(w.ctx, false); next > longestSleep {
		t.Errorf("sleeps for %s", next)
	}
	w.publishes(func(a ownAnswer) { delete(a.devices(), "BOTDEVICE") })
	w.know(w.bot)
	if next := w.hook.resolver.untilNext(w.ctx, false); next > ownSuspectedEvery {
		t.Errorf("sleeps for %s while something is wrong", next)
	}
}

func TestHadIdentityRemembersWhatTheServerHides(t *testing.T) {
	w := newTrustWorld(t)
	if must(w.hook.HadIdentity(w.ctx)) {
		t.Error("there was none yet")
	}
	w.know(w.bot)
	w.publishes(func(a ownAnswer) { a.answer["master_keys"], a.answer["self_signing_keys"] = object{}, object{} })
	w.know(w.bot)
	w.restart()
	if !must(w.hook.HadIdentity(w.ctx)) {
		t.Error("forgotten")
	}
}

// mautrix takes in whoever is in an answer, so nobody may be in it who was not asked about; nor under a name in another case, which
// encoding/json takes for the same.
func TestAnswerAboutUnaskedUsersDoesNotReachMautrix(t *testing.T) {
	for name, hide := range map[string]func(a ownAnswer, other *actor){
		"among those asked about": func(a ownAnswer, other *actor) {
			a.answer["device_keys"].(object)["@alice:test"] = object{}
			a.answer["master_keys"].(object)["@alice:test"] = other.masterObject()
		},
		"under names in capitals": func(a ownAnswer, other *actor) {
			a.answer["Device_Keys"] = object{"@alice:test": object{}}
			a.answer["MASTER_KEYS"] = object{"@alice:test": other.masterObject()}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			w.know(alice.owner)
			other := newActor("@alice:test")
			w.publishes(func(a ownAnswer) { hide(a, other) })
			if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{w.bot.userID}, true); err != nil {
				t.Fatal(err)
			}
			devices := must(w.hook.mach.CryptoStore.GetDevices(w.ctx, "@alice:test"))
			if device := devices["ALICE"]; len(devices) != 1 || device.IdentityKey != alice.account.IdentityKey() {
				t.Errorf("mautrix has the devices %v", devices)
			}
			if keys := must(w.hook.mach.CryptoStore.GetCrossSigningKeys(w.ctx, "@alice:test")); keys[id.XSUsageMaster].Key != alice.owner.masterKey() {
				t.Errorf("mautrix has the keys %v", keys)
			}
			if own := must(w.hook.mach.CryptoStore.GetDevices(w.ctx, w.bot.userID)); len(own) != 1 {
				t.Errorf("who was asked about is left out: %v", own)
			}
		})
	}
}

package cryptohook

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"
)

// interrupted lets something happen before a request is answered.
type interrupted struct {
	http.RoundTripper
	path   string
	happen func()
}

func (s *interrupted) RoundTrip(req *http.Request) (*http.Response, error) {
	if strings.HasSuffix(req.URL.Path, s.path) {
		s.happen()
	}
	return s.RoundTripper.RoundTrip(req)
}

// What is verified is a key, not a name: a server that shows another identity while we sign one gains nothing.
func TestIdentityThatIsReplacedWhileWeSignItIsNotVerified(t *testing.T) {
	w, alice, _ := twoPeople(t)
	signed := alice.owner.masterKey()
	w.hook.transport.base = &interrupted{w.server, "/keys/signatures/upload", func() {
		alice.owner.reset()
		w.know(alice.owner)
	}}
	if err := w.hook.Verify(w.ctx, "@alice:test", signed); err != nil {
		t.Fatal(err)
	}
	w.wantStanding("@alice:test", StandingUnverified)
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey == signed || identity.VerifiedBy != "" {
		t.Errorf("stored %+v", identity)
	}
}

// forbid has one kind of write fail in our table with that word in its definition.
func (w *trustWorld) forbid(operation, word string) {
	w.t.Helper()
	if onPostgres {
		w.t.Skip("triggers as SQLite knows them")
	}
	var table string
	err := w.db.QueryRow(w.ctx, `
		SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'sendertrust%' AND sql LIKE '%' || $1 || '%'
	`, word).Scan(&table)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err = w.db.Exec(w.ctx, "CREATE TRIGGER forbidden BEFORE "+operation+" ON "+table+" BEGIN SELECT RAISE(ABORT, 'forbidden'); END"); err != nil {
		w.t.Fatal(err)
	}
}

// A decision on somebody is stored as a whole, or not at all, and whoever has made it is told.
func TestDecisionThatCannotBeStoredIsAnErrorAndNotHalfStored(t *testing.T) {
	const withdrawals, identities, sessions = "sendertrust_withdrawal", "first_master_key", "next_retry_time_ms"
	for name, tc := range map[string]struct {
		// before and decide are what happens, as in testdata/truth.yaml; table and operation what fails in the second.
		before, decide   string
		operation, table string
	}{
		"verify, a withdrawal stays":          {"withdraw", "verify", "DELETE", withdrawals},
		"verify, the identity stays":          {"withdraw", "verify", "UPDATE", identities},
		"verify, the session stays":           {"withdraw", "verify", "UPDATE", sessions},
		"withdraw, not noted":                 {"verify", "withdraw", "INSERT", withdrawals},
		"withdraw, the identity stays":        {"verify", "withdraw", "UPDATE", identities},
		"withdraw, the session stays":         {"verify", "withdraw", "UPDATE", sessions},
		"a pin taken out, not noted":          {"pin", "unpin", "INSERT", withdrawals},
		"a pin taken out, the identity stays": {"pin", "unpin", "UPDATE", identities},
		"a pin taken out, the session stays":  {"pin", "unpin", "UPDATE", sessions},
		"a pin put in, the identity stays":    {"withdraw", "pin", "UPDATE", identities},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTruthWorld(t)
			w.tell([]string{"changed", "share"})
			decisions := map[string]func() error{
				"verify":   func() error { return w.hook.Verify(w.ctx, "@alice:test", w.alice.owner.masterKey()) },
				"withdraw": func() error { return w.hook.WithdrawVerification(w.ctx, "@alice:test") },
				"pin": func() error {
					w.pins["@alice:test"] = w.alice.owner.masterKey()
					return w.hook.prepare(w.ctx)
				},
				"unpin": func() error {
					delete(w.pins, "@alice:test")
					return w.hook.prepare(w.ctx)
				},
			}
			w.tell([]string{tc.before, "resolve"})
			identity, row := *must(w.hook.store.identity(w.ctx, "@alice:test")), *w.row(w.session, w.alice)
			withdrawn := must(w.hook.store.isWithdrawn(w.ctx, "@alice:test", identity.MasterKey))
			w.forbid(tc.operation, tc.table)
			w.changes.take()
			if err := decisions[tc.decide](); err == nil {
				t.Error("nobody is told that it was not stored")
			}
			if now := *must(w.hook.store.identity(w.ctx, "@alice:test")); now != identity {
				t.Errorf("the identity was %+v, and is %+v", identity, now)
			}
			if now := w.row(w.session, w.alice); now.State != row.State {
				t.Errorf("the session was %s, and is %s", row.State, now.State)
			}
			if now := must(w.hook.store.isWithdrawn(w.ctx, "@alice:test", identity.MasterKey)); now != withdrawn {
				t.Errorf("a withdrawal was noted: %v, and is: %v", withdrawn, now)
			}
			if _, users := w.changes.take(); users["@alice:test"] {
				t.Error("a change is told of that is not stored")
			}
		})
	}
}

// A pinned key whose signature the server does not take is signed when it does.
func TestPinThatCannotBeSignedIsNotCalledSigned(t *testing.T) {
	w := newTruthWorld(t)
	w.tell([]string{"changed", "pin"})
	w.server.other = func(req *http.Request) (int, []byte) {
		if strings.HasSuffix(req.URL.Path, "/keys/signatures/upload") {
			return http.StatusForbidden, []byte(`{"errcode": "M_FORBIDDEN"}`)
		}
		return 0, nil
	}
	w.tell([]string{"changed"})
	w.wantStanding("@alice:test", StandingUnverified)
	if strings.Contains(w.log.String(), "Signed a pinned master key") {
		t.Error("the log says that it is signed")
	}
	w.server.other = nil
	w.tell([]string{"changed"})
	w.wantStanding("@alice:test", StandingVerified)
	if !strings.Contains(w.log.String(), "Signed a pinned master key") {
		t.Error("the log does not say that it is signed")
	}
}

// What was told is reviewed as a message of now is judged (see testdata/truth.yaml), but for what its sender's keys do not decide.
func TestReviewLeavesAloneWhatKeysDoNotDecide(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	for _, tc := range []struct {
		told Verdict
		want Code
	}{
		{Verdict{Code: CodeSentInClear, SessionID: s.id()}, CodeSentInClear},
		{Verdict{Code: CodeNotEncrypted, SessionID: s.id()}, CodeNotEncrypted},
		{Verdict{Code: CodeUnableToDecrypt, SessionID: s.id()}, CodeUnableToDecrypt},
		{Verdict{Code: CodeMismatchedSender, Reason: ReasonReplayed, SessionID: s.id()}, CodeMismatchedSender},
		{Verdict{Code: CodeMismatchedSender, Reason: ReasonOtherSender, SessionID: s.id()}, CodeUnverifiedIdentity},
		{Verdict{Code: CodeSessionConflict, SessionID: s.id()}, CodeUnverifiedIdentity},
		{Verdict{Code: CodeUnverifiedIdentity, SessionID: "of which nothing is known"}, CodeAuthenticityNotGuaranteed},
	} {
		if now, err := w.hook.Review(w.ctx, tc.told, "@alice:test"); err != nil || now.Code != tc.want {
			t.Errorf("%s (%s) becomes %s (%v), want %s", tc.told.Code, tc.told.Reason, now.Code, err, tc.want)
		}
	}
}

func TestReviewLeavesForgersOut(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(mallory, s, embedding(mallory.forgedKeys()))}})
	w.clock.advance(1)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	seen := w.judgeNow(w.say(alice, s, "hello"))
	wantCode(t, seen, CodeUnverifiedIdentity)
	if now, err := w.hook.Review(w.ctx, seen.verdict, "@alice:test"); err != nil || now.Code != CodeUnverifiedIdentity {
		t.Errorf("it becomes %s (%v)", now.Code, err)
	}
}

func TestReviewSaysWhenItCannotNameTheGiver(t *testing.T) {
	w := newMergeWorld(t)
	w.deliver(mergeKey{By: SourceHistoryBundle})
	told := w.judgeNow(w.say(w.alice, w.session, "hello")).verdict
	if _, err := w.hook.Review(w.ctx, told, "@alice:test"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.db.Exec(w.ctx, "ALTER TABLE crypto_megolm_inbound_session RENAME TO gone"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.Review(w.ctx, told, "@alice:test"); err == nil {
		t.Error("no error from a broken database")
	}
	if _, err := w.db.Exec(w.ctx, "ALTER TABLE gone RENAME TO crypto_megolm_inbound_session"); err != nil {
		t.Fatal(err)
	}
}

func TestChangesAreToldOnceAndOnlyIfThereAreAny(t *testing.T) {
	var told []Change
	w, alice, _ := twoPeople(t, func(o *Options) { o.OnChange = func(change Change) { told = append(told, change) } })
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	told = nil
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	if len(told) != 1 || !slices.Equal(told[0].Sessions, []id.SessionID{s.id()}) || len(told[0].Users) > 0 {
		t.Errorf("told of one new session: %+v", told)
	}
	told = nil
	w.sync(syncPart{})
	if len(told) > 0 {
		t.Errorf("told of nothing: %+v", told)
	}
}

func TestNobodyNeedsToBeToldOfChanges(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.OnChange = nil })
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.wantState(s, alice, StateSenderUnverified)
}

// Half an answer to a key query might be the half that takes devices away.
func TestAnswerThatIsHalfReadableIsIgnored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.server.forge = func(answer object) {
		answer["device_keys"].(object)["@alice:test"], answer["master_keys"] = object{}, 5
	}
	_, _ = w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true)
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != alice.signingKey() {
		t.Error("the device is gone")
	}
}

// What mautrix knows and we do not would never be asked for again.
func TestAnswerThatCannotBeStoredIsNotHandedOn(t *testing.T) {
	w, alice, _ := twoPeople(t)
	former := alice.owner.masterKey()
	alice.owner.reset()
	w.forbid("UPDATE", "first_master_key")
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err == nil {
		t.Error("the key query has succeeded")
	}
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != former {
		t.Error("the identity was stored")
	}
	if must(w.hook.mach.CryptoStore.GetCrossSigningKeys(w.ctx, "@alice:test"))[id.XSUsageMaster].Key != former {
		t.Error("mautrix knows more than we")
	}
}

func TestADeviceWhoseKeyChangesHoldsUpNoOther(t *testing.T) {
	w, alice, _ := twoPeople(t)
	genuine := alice.signingKey()
	alice.owner.devices = nil
	alice.owner.addDevice("ALICE")
	second, third := alice.owner.addDevice("SECOND"), alice.owner.addDevice("THIRD")
	w.know(alice.owner)
	for deviceID, want := range map[id.DeviceID]id.Ed25519{"ALICE": genuine, "SECOND": second.signingKey(), "THIRD": third.signingKey()} {
		if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", deviceID)); key != want {
			t.Errorf("the key of %s is %q, want %s", deviceID, key, want)
		}
	}
}

// A warning that is repeated at every key query is read by nobody.
func TestLogTellsOnceOfWhatAServerPublishes(t *testing.T) {
	alice, bob := newActor("@alice:test"), newActor("@bob:test")
	w := newTrustWorld(t, func(o *Options) {
		o.VerifiedUsers = map[id.UserID]id.Ed25519{"@alice:test": alice.masterKey(), "@bob:test": alice.masterKey()}
	})
	wantTold := func(message string, want int) {
		t.Helper()
		if told := strings.Count(w.log.String(), message); told != want {
			t.Errorf("%q is told %d times, want %d", message, told, want)
		}
	}
	carol := newActor("@carol:test")
	for range 3 {
		w.know(alice, bob, carol)
	}
	wantTold("NOT the one that the configuration pins", 1)
	for line := range strings.Lines(w.log.String()) {
		if strings.Contains(line, "NOT the one") && !strings.Contains(line, "@bob:test") {
			t.Errorf("the wrong user is told of: %s", line)
		}
	}
	wantTold("The identity of this user has changed", 0)
	carol.reset()
	for range 3 {
		w.know(carol)
	}
	wantTold("The identity of this user has changed", 1)
	wantTold("NOT the one that the configuration pins", 1)
}

func TestResolverSleepsUntilThereIsSomethingToDo(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	wantSleep := func(when string, failed bool, least, most time.Duration) {
		t.Helper()
		if sleep := w.hook.resolver.untilNext(w.ctx, failed); sleep < least || sleep > most {
			t.Errorf("%s: sleeps for %s, want %s to %s", when, sleep, least, most)
		}
	}
	wantSleep("nothing to do", false, longestSleep, longestSleep)
	wantSleep("failed", true, afterFailure, afterFailure)
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom), withoutDeviceKeys)}})
	w.resolve()
	wantSleep("a retry is planned", false, 4*time.Second, 6*time.Second)
	w.server.down = true
	w.hook.resolver.ask("@alice:test")
	wantSleep("a list is outdated", false, retrySlack, retrySlack)
	w.resolve()
	w.resolve()
	wantSleep("the server is down", false, retrySlack, firstBackoff)
}

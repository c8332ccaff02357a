package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

func TestManyUsersAreAskedForInFewRequests(t *testing.T) {
	w := newTrustWorld(t)
	var events []object
	sessions := make(map[*actorDevice]*megolm)
	for i := range 40 {
		device := w.server.add(newActor(id.UserID(fmt.Sprintf("@user%d:test", i)))).addDevice("DEVICE")
		sessions[device] = newMegolm(trustRoom)
		events = append(events, w.share(device, sessions[device], withoutDeviceKeys))
	}
	w.sync(syncPart{toDevice: events})
	w.resolve()
	if count := w.server.count("keys/query"); count != 1 {
		t.Errorf("%d requests", count)
	}
	for device, s := range sessions {
		w.wantState(s, device, StateSenderUnverified)
	}
}

// The schedule, tried out: 12 tries with growing distance, then silence until somebody else learns something.
func TestRetriesEndAfterTwelveAndAKeyQueryLeadsOn(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	for step := 0; step < 40; step++ {
		w.resolve()
		w.clock.advance(2 * time.Hour)
	}
	row := w.row(s, alice)
	if !row.NextRetry.IsZero() || row.State != StateUnknownDevice {
		t.Errorf("stored %+v", row)
	}
	// At once, and twelve times by the schedule.
	if count := w.server.count("keys/query"); count != 13 {
		t.Errorf("asked %d times", count)
	}
	w.know(alice.owner)
	w.wantState(s, alice, StateSenderUnverified)
}

func TestRetryWaitsForItsTime(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.resolve()
	row := w.row(s, alice)
	wait := row.NextRetry.Sub(w.clock.Now())
	if row.RetryCount != 1 || wait < 4*time.Second || wait > 6*time.Second {
		t.Errorf("retry %d in %s", row.RetryCount, wait)
	}
	asked := w.server.count("keys/query")
	w.clock.advance(wait - retrySlack - time.Millisecond)
	w.resolve()
	if w.server.count("keys/query") != asked {
		t.Error("asked before its time")
	}
	w.server.add(alice.owner)
	w.clock.advance(time.Millisecond)
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
}

func TestRetriesSurviveARestart(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.restart()
	w.server.add(alice.owner)
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
}

func TestChangedDeviceListSurvivesARestart(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.sync(syncPart{changed: []id.UserID{"@alice:test", "@nobody:test"}})
	w.restart()
	alice.owner.reset()
	asked := w.server.count("keys/query")
	if err := w.hook.resolver.begin(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.resolve()
	if w.server.count("keys/query") != asked+1 {
		t.Error("did not ask for the changed list")
	}
	identity := must(w.hook.store.identity(w.ctx, "@alice:test"))
	if identity.MasterKey != alice.owner.masterKey() {
		t.Error("the change was not seen")
	}
	if current := must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")); !current {
		t.Error("the list is still called outdated")
	}
}

func TestFailedQueryKeepsTheListOutdated(t *testing.T) {
	w, _, _ := twoPeople(t)
	w.server.down = true
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	w.resolve()
	if !w.hook.resolver.pending("@alice:test") || must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")) {
		t.Error("a failed query counts as an answer")
	}
	w.server.down = false
	w.clock.advance(time.Minute)
	w.resolve()
	if w.hook.resolver.pending("@alice:test") || !must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")) {
		t.Error("the answer does not count")
	}
}

// slowServer holds a key query up until it is let go.
type slowServer struct {
	http.RoundTripper
	begun, go_ chan struct{}
	once       sync.Once
}

func (s *slowServer) RoundTrip(req *http.Request) (*http.Response, error) {
	if strings.HasSuffix(req.URL.Path, "/keys/query") {
		resp, err := s.RoundTripper.RoundTrip(req)
		s.once.Do(func() {
			close(s.begun)
			<-s.go_
		})
		return resp, err
	}
	return s.RoundTripper.RoundTrip(req)
}

// A list that changes while the query is under way stays outdated: the answer may be older than the change.
func TestListThatChangesDuringTheQueryIsAskedForAgain(t *testing.T) {
	w, alice, _ := twoPeople(t)
	slow := &slowServer{RoundTripper: w.server, begun: make(chan struct{}), go_: make(chan struct{})}
	w.hook.transport.base = slow
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	var pass sync.WaitGroup
	pass.Go(func() {
		if _, err := w.hook.resolver.pass(w.ctx); err != nil {
			t.Error(err)
		}
	})
	<-slow.begun
	alice.owner.reset()
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	close(slow.go_)
	pass.Wait()
	if !w.hook.resolver.pending("@alice:test") || must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")) {
		t.Error("the older answer counts")
	}
	w.resolve()
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("the change was not seen")
	}
}

// Two questions are under way, and the answer to the first one comes last: it tells of an identity that was replaced meanwhile.
func TestAnswerThatWasOvertakenIsIgnored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	former, s := alice.owner.masterKey(), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	late := &lateServer{RoundTripper: w.server, answered: make(chan struct{}), go_: make(chan struct{})}
	w.hook.transport.base = late
	ask := func() {
		if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
			t.Error(err)
		}
	}
	var first sync.WaitGroup
	first.Go(ask)
	<-late.answered
	alice.owner.reset()
	w.hook.transport.base = w.server
	ask()
	close(late.go_)
	first.Wait()
	w.resolve()
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() || identity.MasterKey == former {
		t.Error("the older answer counts")
	}
	wantCode(t, w.judgeNow(w.say(alice, s, "hello")), CodeIdentityChanged)
	// When there is no question any more, nothing can be overtaken.
	alice.owner.reset()
	ask()
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("the next answer does not count")
	}
	if remembered := len(w.hook.questions.newest); remembered > 0 {
		t.Errorf("%d answers are remembered, and there is no question", remembered)
	}
}

// lateServer has its answers ready, and holds them back.
type lateServer struct {
	http.RoundTripper
	answered, go_ chan struct{}
}

func (s *lateServer) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := s.RoundTripper.RoundTrip(req)
	s.answered <- struct{}{}
	<-s.go_
	return resp, err
}

// One of two users' sessions cannot be read: the other's is not kept locked for that, and nobody counts as being asked for.
func TestGuardsAreReleasedWhenPlanningFails(t *testing.T) {
	sqliteOnly(t) // PostgreSQL stores no text in a number's place
	w, alice, mallory := twoPeople(t)
	sessions := make(map[*actorDevice]*megolm)
	alice.unpublished, mallory.unpublished = true, true
	w.know(alice.owner, mallory.owner)
	for _, device := range []*actorDevice{alice, mallory} {
		sessions[device] = newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(device, sessions[device], withoutDeviceKeys)}})
		w.hook.resolver.stop() // gives up the guards that came with them
	}
	spoil := func(count any) {
		if _, err := w.db.Exec(w.ctx, "UPDATE sendertrust_claim SET retry_count=$1 WHERE session_id=$2", count, sessions[mallory].id()); err != nil {
			t.Fatal(err)
		}
	}
	spoil("not a number")
	for range 8 { // whoever comes first
		if _, err := w.hook.resolver.plan(w.ctx); err == nil {
			t.Fatal("no error from a row that cannot be read")
		}
	}
	for device, session := range sessions {
		guard := w.hook.sessions.TryLock(session.id())
		if guard == nil {
			t.Errorf("the session of %s stays locked", device.owner.userID)
		}
		guard.Unlock()
	}
	spoil(0)
	for device := range sessions {
		device.unpublished = false
	}
	w.resolve()
	for device, session := range sessions {
		w.wantState(session, device, StateSenderUnverified)
	}
}

// Somebody else's question has proven the session before the resolver came to it.
func TestGuardOfASessionThatIsProvenAlreadyIsReleased(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	if guard := w.hook.sessions.TryLock(s.id()); guard != nil {
		t.Fatal("the session is not locked until its sender was asked for")
	}
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.resolver.judgeAnswered(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.wantState(s, alice, StateSenderUnverified)
	queries := w.server.count("keys/query")
	w.resolve()
	if w.server.count("keys/query") != queries {
		t.Error("the sender was asked for all the same")
	}
	if guard := w.hook.sessions.TryLock(s.id()); guard == nil {
		t.Error("the session stays locked")
	}
}

func TestGuardsAreReleasedWhenTheWorkFails(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	ctx, cancel := context.WithCancel(w.ctx)
	cancel()
	_, _ = w.hook.resolver.pass(ctx)
	if _, err := w.db.Exec(w.ctx, "ALTER TABLE sendertrust_device RENAME TO gone"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.resolver.pass(w.ctx); err == nil {
		t.Error("no error from a broken database")
	}
	if guard := w.hook.sessions.TryLock(s.id()); guard == nil {
		t.Error("the session stays locked")
	} else {
		guard.Unlock()
	}
	if _, err := w.db.Exec(w.ctx, "ALTER TABLE gone RENAME TO sendertrust_device"); err != nil {
		t.Fatal(err)
	}
	w.server.add(alice.owner)
	w.clock.advance(time.Minute)
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
}

// Whoever asks for keys, the answer is used: here it is mautrix, for sending.
func TestEveryKeyQueryReevaluatesItsUsers(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.resolve()
	w.server.add(alice.owner)
	if _, err := w.hook.mach.GetOrFetchDevice(w.ctx, "@alice:test", "ALICE"); err != nil {
		t.Fatal(err)
	}
	if worked, err := w.hook.resolver.pass(w.ctx); err != nil || !worked {
		t.Errorf("nothing was done (%v)", err)
	}
	w.wantState(s, alice, StateSenderUnverified)
}

func TestALookThatLearnsNothingIsNoTry(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.crossSigned = false
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	before := w.row(s, alice)
	for range 5 {
		w.know(alice.owner)
	}
	if after := w.row(s, alice); after.RetryCount != before.RetryCount || !after.NextRetry.Equal(before.NextRetry) {
		t.Errorf("retry %d at %s became %d at %s", before.RetryCount, before.NextRetry, after.RetryCount, after.NextRetry)
	}
}

func TestUsersThatWereNotAskedForAreIgnored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	eve := newActor("@eve:test")
	eve.addDevice("EVE")
	fake := newActor("@alice:test")
	w.server.forge = func(answer object) {
		answer["device_keys"].(object)["@eve:test"] = object{"EVE": eve.devices[0].keys()}
		answer["master_keys"].(object)["@eve:test"] = eve.masterObject()
		answer["device_keys"].(object)["@alice:test"] = object{}
		answer["master_keys"].(object)["@alice:test"] = fake.masterObject()
	}
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@mallory:test"}, true); err != nil {
		t.Fatal(err)
	}
	if identity := must(w.hook.store.identity(w.ctx, "@eve:test")); identity != nil {
		t.Errorf("stored %+v", identity)
	}
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("another user's answer has changed alice")
	}
}

// A device ID never changes its ed25519 key while it lives, however often the server says so.
func TestADevicesKeyNeverChanges(t *testing.T) {
	w, alice, _ := twoPeople(t)
	genuine := alice.signingKey()
	alice.owner.devices = nil
	changed := alice.owner.addDevice("ALICE")
	for i := range 3 {
		w.know(alice.owner)
		if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key == changed.signingKey() {
			t.Fatalf("the new key %s was taken for %s at query %d", key, genuine, i+1)
		}
	}
}

func TestADeviceIDMayBeUsedAgainAfterItsDeletion(t *testing.T) {
	w, alice, _ := twoPeople(t)
	alice.owner.devices = nil
	w.know(alice.owner)
	again := alice.owner.addDevice("ALICE")
	w.know(alice.owner)
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != again.signingKey() {
		t.Errorf("the key is %q", key)
	}
}

func TestForgedDevicesAreNotStored(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	w.server.forge = func(answer object) {
		devices := answer["device_keys"].(object)["@alice:test"].(object)
		devices["EXTRA"] = mallory.keys()
		unsigned := alice.selfSignedKeys()
		unsigned["device_id"] = "UNSIGNED"
		devices["UNSIGNED"] = unsigned
		devices["JUNK"] = 5
	}
	// mautrix cannot read the answer as a whole, with junk in it; what is good in it is not to be lost, nor what is bad to be kept.
	_, _ = w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true)
	for _, deviceID := range []id.DeviceID{"EXTRA", "UNSIGNED", "JUNK"} {
		if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", deviceID)); key != "" {
			t.Errorf("%s was stored", deviceID)
		}
	}
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != alice.signingKey() {
		t.Error("the genuine device is gone")
	}
}

// An answer without a user's keys (a server that cannot be reached) says nothing about that user.
func TestMissingAnswerChangesNothing(t *testing.T) {
	w, alice, _ := twoPeople(t)
	delete(w.server.actors, "@alice:test")
	_, _ = w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true)
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != alice.signingKey() {
		t.Error("the device is gone")
	}
	alice.owner.hidden = true
	w.know(alice.owner)
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("the identity is gone")
	}
}

func TestPinIsSignedOnceAndOnlyTheRightKey(t *testing.T) {
	alice, bob := newActor("@alice:test"), newActor("@bob:test")
	w := newTrustWorld(t, func(o *Options) {
		o.VerifiedUsers = map[id.UserID]id.Ed25519{"@alice:test": alice.masterKey(), "@bob:test": alice.masterKey()}
	})
	w.server.add(alice)
	w.server.add(bob)
	for range 3 {
		if err := w.hook.resolver.begin(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.resolve()
	}
	if count := w.server.count("keys/signatures/upload"); count != 1 {
		t.Errorf("signed %d times", count)
	}
	if standing := w.hook.anchor().judge(must(w.hook.store.identity(w.ctx, "@alice:test"))); standing != StandingVerified {
		t.Errorf("alice's standing is %s", standing)
	}
	if standing := w.hook.anchor().judge(must(w.hook.store.identity(w.ctx, "@bob:test"))); standing != StandingViolation {
		t.Errorf("bob's standing is %s", standing)
	}
	if !strings.Contains(w.log.String(), "NOT the one that the configuration pins") {
		t.Error("the log does not say that bob's pin does not fit")
	}
}

func TestResolverRunsAndEndsWithItsContext(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	ctx, cancel := context.WithCancel(w.ctx)
	var resolver sync.WaitGroup
	resolver.Go(func() { w.hook.resolver.run(ctx) })
	defer resolver.Wait()
	defer cancel()
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	for w.row(s, alice).State == StateUnknownDevice {
		if w.ctx.Err() != nil {
			t.Fatal("never resolved")
		}
	}
	w.wantState(s, alice, StateSenderUnverified)
}

// stuckServer holds the key queries about some users up until it is let go, or their context ends, and tells when one has begun.
type stuckServer struct {
	http.RoundTripper
	stuck func(userID id.UserID) bool
	begun chan struct{}
	go_   chan struct{}
	// panics: the network is broken beyond an error.
	panics bool
}

func newStuckServer(w *trustWorld, stuck func(userID id.UserID) bool) *stuckServer {
	s := &stuckServer{RoundTripper: w.server, stuck: stuck, begun: make(chan struct{}, 100), go_: make(chan struct{})}
	w.hook.transport.base = s
	return s
}

func (s *stuckServer) RoundTrip(req *http.Request) (*http.Response, error) {
	if !strings.HasSuffix(req.URL.Path, "/keys/query") {
		return s.RoundTripper.RoundTrip(req)
	}
	body := must(io.ReadAll(req.Body))
	req.Body = io.NopCloser(bytes.NewReader(body))
	var asked mautrix.ReqQueryKeys
	if err := json.Unmarshal(body, &asked); err != nil {
		return nil, err
	}
	for userID := range asked.DeviceKeys {
		if !s.stuck(userID) {
			continue
		}
		s.begun <- struct{}{}
		if s.panics {
			panic("no network")
		}
		select {
		case <-s.go_:
		case <-req.Context().Done():
			return nil, req.Context().Err()
		}
		break
	}
	return s.RoundTripper.RoundTrip(req)
}

func everybody(id.UserID) bool { return true }

// SEED.md, steps C and F: the guard is held from when the key comes until its sender was asked for, and released however that ends.
func TestGuardIsHeldUntilTheSenderWasAskedFor(t *testing.T) {
	for name, end := range map[string]func(server *stuckServer, stop context.CancelFunc){
		"answered":   func(server *stuckServer, _ context.CancelFunc) { close(server.go_) },
		"shut down":  func(_ *stuckServer, stop context.CancelFunc) { stop() },
		"in a panic": nil,
	} {
		t.Run(name, func(t *testing.T) {
			w := newTrustWorld(t)
			alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
			server := newStuckServer(w, everybody)
			server.panics = end == nil
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
			if guard := w.hook.sessions.TryLock(s.id()); guard != nil {
				t.Fatal("nobody holds the session that waits for its sender's keys")
			}
			ctx, stop := context.WithCancel(w.ctx)
			defer stop()
			batches := must(w.hook.resolver.plan(ctx))
			w.hook.resolver.start(ctx, batches)
			<-server.begun
			if end != nil {
				if guard := w.hook.sessions.TryLock(s.id()); guard != nil {
					t.Error("the guard was released while the sender is being asked for")
				}
				if again := must(w.hook.resolver.plan(ctx)); len(again) > 0 {
					t.Error("the sender is asked for twice at once")
				}
				end(server, stop)
			}
			w.hook.resolver.queries.Wait()
			if guard := w.hook.sessions.TryLock(s.id()); guard == nil {
				t.Error("the session stays locked")
			} else {
				guard.Unlock()
			}
			server.panics, server.stuck = false, func(id.UserID) bool { return false }
			w.clock.advance(time.Minute)
			w.resolve()
			w.wantState(s, alice, StateSenderUnverified)
		})
	}
}

func TestGuardsThatNobodyTookUpAreReleasedAtTheEnd(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	ctx, stop := context.WithCancel(w.ctx)
	stop()
	w.hook.resolver.run(ctx)
	late := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, late, withoutDeviceKeys)}})
	for _, session := range []*megolm{s, late} {
		if guard := w.hook.sessions.TryLock(session.id()); guard == nil {
			t.Error("a session stays locked after the end")
		}
	}
}

// Somebody else's homeserver that does not answer holds up neither our own users nor, once it is known to be silent, those of others.
func TestSilentHomeserverHoldsUpNobodyElse(t *testing.T) {
	w := newTrustWorld(t)
	ours := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	theirs := w.server.add(newActor("@bob:remote.test")).addDevice("BOB")
	silent := newActor("@carol:silent.test").addDevice("CAROL")
	share := func(device *actorDevice) *megolm {
		s := newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(device, s, withoutDeviceKeys)}})
		return s
	}
	fromCarol := share(silent)
	w.resolve() // nobody answers for her
	w.clock.advance(time.Minute)
	server := newStuckServer(w, func(userID id.UserID) bool { return userID == "@carol:silent.test" })
	fromAlice, fromBob := share(ours), share(theirs)
	ctx, stop := context.WithCancel(w.ctx)
	defer stop()
	batches := must(w.hook.resolver.plan(ctx))
	for _, b := range batches {
		if slices.Contains(b.users, "@carol:silent.test") && len(b.users) > 1 {
			t.Errorf("asked for together with a silent homeserver's user: %v", b.users)
		}
	}
	w.hook.resolver.start(ctx, batches)
	<-server.begun
	for w.row(fromAlice, ours).State != StateSenderUnverified || w.row(fromBob, theirs).State != StateSenderUnverified {
		if w.ctx.Err() != nil {
			t.Fatal("held up")
		}
	}
	w.wantState(fromCarol, silent, StateUnknownDevice)
	w.server.add(silent.owner)
	close(server.go_)
	w.hook.resolver.queries.Wait()
	w.wantState(fromCarol, silent, StateSenderUnverified)
	if _, stillSilent := w.hook.resolver.silent["silent.test"]; stillSilent {
		t.Error("a homeserver that answers is still called silent")
	}
}

func TestUsersOfManyHomeserversAreAskedForInAFewRequests(t *testing.T) {
	w := newTrustWorld(t)
	var events []object
	for i := range 100 {
		device := w.server.add(newActor(id.UserID(fmt.Sprintf("@user:server%d.test", i)))).addDevice("DEVICE")
		events = append(events, w.share(device, newMegolm(trustRoom), withoutDeviceKeys))
	}
	w.sync(syncPart{toDevice: events})
	w.resolve()
	if count := w.server.count("keys/query"); count > remoteBuckets {
		t.Errorf("%d requests", count)
	}
	if unproven := w.countRows("state='unknown_device'"); unproven > 0 {
		t.Errorf("%d sessions are not resolved", unproven)
	}
}

func (w *trustWorld) countRows(where string) (n int) {
	w.t.Helper()
	if err := w.db.QueryRow(w.ctx, "SELECT COUNT(*) FROM sendertrust_session WHERE "+where).Scan(&n); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// One /sync brings two sessions of a device, and only one of the messages proves it: the order makes no difference.
func TestProofInTheSameSyncCounts(t *testing.T) {
	for _, proofFirst := range []bool{true, false} {
		w := newTrustWorld(t)
		alice := newActor("@alice:test").addDevice("ALICE")
		alice.unpublished = true
		w.know(alice.owner)
		proven, bare := newMegolm(trustRoom), newMegolm(trustRoom)
		events := []object{w.share(alice, proven), w.share(alice, bare, embedding(alice.selfSignedKeys()))}
		if !proofFirst {
			// The Olm messages of one session come in any order.
			events[0], events[1] = events[1], events[0]
		}
		w.sync(syncPart{toDevice: events})
		w.wantState(proven, alice, StateSenderUnverified)
		w.wantState(bare, alice, StateSenderUnverified)
	}
}

// A forged copy of a device's keys is found out though another message of the session does not hold it.
func TestForgedCopyIsNotGotRidOf(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.crossSigned = false
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.selfSignedKeys()))}})
	w.wantState(s, alice, StateDeviceInfo)
	w.know(alice.owner)
	w.wantState(s, alice, StateRejected)
	wantCode(t, w.judgeNow(w.say(alice, s, "hello")), CodeSessionRejected)
}

// The device has been proven by what the server shows, and its session is not judged by that yet, when a forged copy of its keys comes.
func TestForgedCopyCannotTakeAwayWhatIsAboutToBeProven(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.server.add(alice.owner)
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
		t.Fatal(err)
	}
	w.wantState(s, alice, StateUnknownDevice)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	w.wantState(s, alice, StateSenderUnverified)
	if w.storedKey(s, trustRoom) == nil {
		t.Error("the key is gone")
	}
}

// Somebody claims another's session, and what is known of the claimant changes before that is stored: it stays the claimant's claim.
func TestClaimThatIsDerivedAnewStaysItsOwn(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	mallory := newActor("@mallory:test").addDevice("MALLORY")
	mallory.unpublished = true
	w.know(alice.owner, mallory.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	// Mallory's own session brings news of Mallory's device: its signature was never seen.
	w.sync(syncPart{toDevice: []object{w.share(mallory, newMegolm(trustRoom)), w.share(mallory, s)}})
	if claims := w.claims(s); len(claims) != 2 {
		t.Errorf("%d claims: %s", len(claims), rawJSON(claims))
	}
	if row := w.row(s, alice); row.Sender != "@alice:test" || row.State != StateSenderUnverified {
		t.Errorf("the owner's claim has become %s", rawJSON(row))
	}
	if row := w.row(s, mallory); row.Sender != "@mallory:test" || row.State != StateSenderUnverified {
		t.Errorf("the other claim is %s", rawJSON(row))
	}
}

// Between a derivation and its commit something may be learnt: what that changed does not know the session yet.
func TestWhatIsLearntBeforeTheCommitCounts(t *testing.T) {
	w, alice, _ := twoPeople(t)
	unsigned := alice.owner.addDevice("SECOND")
	unsigned.crossSigned = false
	w.know(alice.owner)
	proven, unproven := newMegolm(trustRoom), newMegolm(trustRoom)
	resp, _ := w.response(syncPart{toDevice: []object{w.share(alice, proven), w.share(unsigned, unproven)}})
	if _, err := w.hook.receive(w.ctx, resp); err != nil {
		t.Fatal(err)
	}
	alice.owner.verifiedBy, unsigned.crossSigned = w.bot, true
	w.know(alice.owner)
	if err := w.hook.commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.hook.unlockKept(true)
	w.wantState(proven, alice, StateSenderVerified)
	w.wantState(unproven, unsigned, StateSenderVerified)
}

func TestVerificationIsRefusedForGoodReasons(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) {
		o.VerifiedUsers = map[id.UserID]id.Ed25519{"@mallory:test": "pinned"}
	})
	ownKey, otherKey := w.bot.masterKey(), newActor("@alice:test").masterKey()
	for name, tc := range map[string]struct {
		got, want error
	}{
		"another key":             {w.hook.Verify(w.ctx, "@alice:test", otherKey), ErrOtherMasterKey},
		"nobody known":            {w.hook.Verify(w.ctx, "@nobody:test", otherKey), ErrUnknownIdentity},
		"ourselves":               {w.hook.Verify(w.ctx, w.bot.userID, ownKey), ErrOwnUser},
		"pinned":                  {w.hook.Verify(w.ctx, "@mallory:test", otherKey), ErrPinned},
		"withdrawing a pin":       {w.hook.WithdrawVerification(w.ctx, "@mallory:test"), ErrPinned},
		"withdrawing ourselves":   {w.hook.WithdrawVerification(w.ctx, w.bot.userID), ErrOwnUser},
		"withdrawing from nobody": {w.hook.WithdrawVerification(w.ctx, "@nobody:test"), ErrUnknownIdentity},
	} {
		if !errors.Is(tc.got, tc.want) {
			t.Errorf("%s: error %v, want %v", name, tc.got, tc.want)
		}
	}
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.VerifiedBy != "" || w.server.count("keys/signatures/upload") > 0 {
		t.Errorf("a refused verification has left %+v", identity)
	}
	w.wantStanding(alice.owner.userID, StandingUnverified)
}

func (w *trustWorld) wantStanding(userID id.UserID, want Standing) {
	w.t.Helper()
	if got := w.hook.anchor().judge(must(w.hook.store.identity(w.ctx, userID))); got != want {
		w.t.Errorf("standing of %s is %s, want %s", userID, got, want)
	}
}

// Sessions of one device share a walk; what is their own stays theirs.
func TestSessionsOfOneDeviceAreJudgedAlike(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	legacy, fresh := newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, legacy, withoutDeviceKeys), w.share(alice, fresh, withoutDeviceKeys)}})
	w.resolve()
	if _, err := w.db.Exec(w.ctx, "UPDATE sendertrust_claim SET legacy_session=true, retry_count=7 WHERE session_id=$1", legacy.id()); err != nil {
		t.Fatal(err)
	}
	w.clock.advance(time.Hour)
	w.resolve()
	if one, other := w.row(legacy, alice), w.row(fresh, alice); !one.Legacy || other.Legacy || one.RetryCount != 8 || other.RetryCount != 2 {
		t.Errorf("a look that found nothing has left %+v and %+v", one, other)
	}
	w.know(alice.owner)
	for _, session := range []*megolm{legacy, fresh} {
		row := w.row(session, alice)
		if row.State != StateSenderUnverified || row.Legacy || row.RetryCount != 0 || !row.NextRetry.IsZero() || row.DeviceKeys != nil {
			t.Errorf("proven, and stored %+v", row)
		}
	}
}

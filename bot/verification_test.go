package bot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/png"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/makiuchi-d/gozxing"
	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// desk is a room with an operator and many people, with a helper that does what the test says.
type desk struct {
	*fakeRooms
	v *verifications
	// reports are what is known of people; verified are those whom the bot has verified.
	reports  map[id.UserID]*cryptohook.UserReport
	verified map[id.UserID]id.Ed25519
	// cached is what mautrix holds for people, if it is not what the reports say.
	cached map[id.UserID]id.Ed25519
	// calls are what the helper was told to do; panics is one of them that panics.
	calls  []string
	panics string
	// confirming is what the helper does when it is told that the emojis match; nil: it completes.
	confirming func(txn *verificationhelper.VerificationTransaction) error
	// unasked is why the homeserver gives no keys.
	unasked error
}

const (
	alicesKey id.Ed25519 = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	otherKey  id.Ed25519 = "BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBA"
)

func newTestDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{
		fakeRooms: newFakeRooms(t, ModeReply), reports: make(map[id.UserID]*cryptohook.UserReport),
		verified: make(map[id.UserID]id.Ed25519), cached: make(map[id.UserID]id.Ed25519),
	}
	d.bot.config.Trust.Operators = []id.UserID{"@olga:example.org"}
	d.join("@olga:example.org")
	d.restart()
	return d
}

// restart is a new process.
func (d *desk) restart() {
	d.v = d.bot.newVerifications(d)
	d.v.helper = fakeHelper{d}
	d.v.cached = func(_ context.Context, userID id.UserID) (id.Ed25519, error) {
		if key, other := d.cached[userID]; other {
			return key, nil
		}
		return d.reports[userID].MasterKey, nil
	}
	d.bot.verifications = d.v
}

// User implements [trust].
func (d *desk) User(_ context.Context, userID id.UserID) (*cryptohook.UserReport, error) {
	return d.reports[userID], nil
}

// Recheck implements [trust].
func (d *desk) Recheck(context.Context, []id.UserID) error { return d.unasked }

// Verify implements [trust].
func (d *desk) Verify(_ context.Context, userID id.UserID, masterKey id.Ed25519) error {
	if d.reports[userID].MasterKey != masterKey {
		return cryptohook.ErrOtherMasterKey
	}
	d.verified[userID] = masterKey
	return nil
}

// fakeHelper notes what it is told.
type fakeHelper struct{ *desk }

func (h fakeHelper) call(what string, txnID id.VerificationTransactionID, change func(txn *verificationhelper.VerificationTransaction)) error {
	if h.panics == what {
		panic("the helper has a fault")
	}
	h.calls = append(h.calls, what)
	txn, err := h.v.store.GetVerificationTransaction(h.t.Context(), txnID)
	if err != nil {
		return err
	}
	change(&txn)
	return h.v.store.SaveVerificationTransaction(h.t.Context(), txn)
}

func (h fakeHelper) AcceptVerification(ctx context.Context, txnID id.VerificationTransactionID) error {
	callbacks{h.v}.VerificationReady(ctx, txnID, "", true, false, nil)
	return h.call("accept", txnID, func(txn *verificationhelper.VerificationTransaction) {
		txn.VerificationState = verificationhelper.VerificationStateReady
	})
}

func (h fakeHelper) StartSAS(_ context.Context, txnID id.VerificationTransactionID) error {
	return h.call("start", txnID, func(*verificationhelper.VerificationTransaction) {})
}

func (h fakeHelper) ConfirmSAS(_ context.Context, txnID id.VerificationTransactionID) error {
	var err error
	called := h.call("confirm", txnID, func(txn *verificationhelper.VerificationTransaction) {
		if h.confirming == nil {
			txn.SentOurDone = true
		} else {
			err = h.confirming(txn)
		}
	})
	return errors.Join(called, err)
}

// person makes somebody with an identity and a device that it has signed.
func (d *desk) person(userID id.UserID) {
	d.t.Helper()
	d.join(userID)
	d.reports[userID] = &cryptohook.UserReport{
		UserID: userID, MasterKey: alicesKey, FirstMasterKey: alicesKey, SelfSigningKey: otherKey, Standing: cryptohook.StandingUnverified,
		Devices: []cryptohook.DeviceReport{{DeviceID: "PHONE", SignedByOwner: true}, {DeviceID: "OLD", SignedByOwner: true, Deleted: true}, {DeviceID: "WEB"}},
	}
}

// request has somebody ask, and gives what the bot has sent.
func (d *desk) request(userID id.UserID, txnID id.VerificationTransactionID, change ...func(*request)) []saidEvent {
	r := &request{
		txnID: txnID, userID: userID, deviceID: "PHONE", methods: []event.VerificationMethod{event.VerificationMethodSAS}, sentAt: d.now, roomID: modesRoom,
		verdict: cryptohook.Verdict{Code: cryptohook.CodeUnverifiedIdentity, UserID: userID, DeviceID: "PHONE"},
	}
	for _, alter := range change {
		alter(r)
	}
	return d.says(func() { d.v.take(d.t.Context(), r) })
}

// shows has the helper show emojis.
func (d *desk) shows(txnID id.VerificationTransactionID) {
	callbacks{d.v}.ShowSAS(d.t.Context(), txnID, []rune("🐶🐱🦁🐎🦄🐷🐘"), []string{"Dog", "Cat", "Lion", "Horse", "Unicorn", "Pig", "Thumbs Up"}, []int{1234, 5678, 9012})
	d.v.follow(d.t.Context(), d.v.open[txnID])
}

// order has somebody decide.
func (d *desk) decide(sender id.UserID, name string, args ...string) response {
	o := &order{
		evt: &event.Event{ID: "$order", Sender: sender, RoomID: modesRoom, Type: event.EventMessage}, speech: speeches["en"], name: name, args: args,
		verdict: cryptohook.Verdict{Code: cryptohook.CodeVerified, UserID: sender},
	}
	if name == "deny" {
		return d.bot.orderDeny(d.t.Context(), o)
	}
	return d.bot.orderConfirm(d.t.Context(), o)
}

// code is what confirms a verification; empty if nothing does yet.
func (d *desk) code(txnID id.VerificationTransactionID) string { return d.v.open[txnID].code }

// saidAll is everything that was said, in words.
func saidAll(said []saidEvent) string {
	var all []string
	for _, s := range said {
		all = append(all, s.evtType+": "+s.body())
	}
	return strings.Join(all, "\n")
}

// left says what is left of verifications, in memory and in the database.
func (d *desk) left() string {
	open, err := d.bot.reviser.records.openVerifications(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	held, _ := d.v.store.GetAllVerificationTransactions(d.t.Context())
	if len(open) == 0 && len(held) == 0 && len(d.v.open) == 0 {
		return ""
	}
	return fmt.Sprintf("%d in the database, %d in the helper's store, %d open", len(open), len(held), len(d.v.open))
}

func TestVerificationEndsAfterTenMinutes(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	d.request("@alice:example.org", "$one")
	d.now = d.now.Add(verificationLasts - time.Second)
	if said := d.says(func() { d.v.expire(t.Context()) }); len(said) > 0 {
		t.Fatalf("too early: %s", saidAll(said))
	}
	d.now = d.now.Add(time.Second)
	said := saidAll(d.says(func() { d.v.expire(t.Context()) }))
	if !strings.Contains(said, "m.key.verification.cancel") || !strings.Contains(said, "has taken too long") {
		t.Errorf("said %s", said)
	}
	if left := d.left(); left != "" {
		t.Error(left)
	}
	if r := d.decide("@olga:example.org", "confirm", "@alice:example.org"); r.detail != "not_open" {
		t.Errorf("answered %q", r.words.plain())
	}
}

func TestVerificationIsEndedByTheNextProcess(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	d.request("@alice:example.org", "$one")
	d.restart()
	said := saidAll(d.says(func() { d.v.endLeftovers(t.Context()) }))
	if !strings.Contains(said, "m.key.verification.cancel") || !strings.Contains(said, "I was started anew") {
		t.Errorf("said %s", said)
	}
	if left := d.left(); left != "" {
		t.Error(left)
	}
	if said = saidAll(d.request("@alice:example.org", "$one")); said != "" {
		t.Errorf("the request came again, and the bot said %s", said)
	}
	if said = saidAll(d.says(func() { d.v.endLeftovers(t.Context()) })); said != "" {
		t.Errorf("the third process said %s", said)
	}
}

func TestRequestThatIsDeliveredAgainChangesNothing(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	first := saidAll(d.request("@alice:example.org", "$one"))
	if !strings.Contains(first, "are about to verify each other") {
		t.Fatalf("said %s", first)
	}
	if again := saidAll(d.request("@alice:example.org", "$one")); again != "" || !slices.Equal(d.calls, []string{"accept"}) {
		t.Errorf("said %s; the helper was told %v", again, d.calls)
	}
}

func TestRequestsAreRefusedWithAReason(t *testing.T) {
	for name, c := range map[string]struct {
		change func(d *desk, r *request)
		says   string // empty: nothing
	}{
		"fine":               {func(*desk, *request) {}, "are about to verify each other"},
		"in the clear":       {func(_ *desk, r *request) { r.verdict = cryptohook.Verdict{Code: cryptohook.CodeSentInClear} }, "are about to verify each other"},
		"old":                {func(_ *desk, r *request) { r.sentAt = r.sentAt.Add(-verificationLasts - time.Second) }, ""},
		"of the future":      {func(_ *desk, r *request) { r.sentAt = r.sentAt.Add(requestEarly + time.Second) }, ""},
		"without a device":   {func(_ *desk, r *request) { r.deviceID = "" }, ""},
		"of many methods":    {func(_ *desk, r *request) { r.methods = make([]event.VerificationMethod, mostMethods+1) }, ""},
		"of no method":       {func(_ *desk, r *request) { r.methods = []event.VerificationMethod{"m.qr_code.show.v1"} }, "no way to verify"},
		"not encrypted":      {func(_ *desk, r *request) { r.verdict.Code = cryptohook.CodeNotEncrypted }, "I cannot verify with you in this room"},
		"sent on":            {func(_ *desk, r *request) { r.verdict.Code = cryptohook.CodeMismatchedSender }, "I am not sure that"},
		"of two claimants":   {func(_ *desk, r *request) { r.verdict.Code = cryptohook.CodeSessionConflict }, "I am not sure that"},
		"of a hearsay key":   {func(_ *desk, r *request) { r.verdict.Code = cryptohook.CodeAuthenticityNotGuaranteed }, "I am not sure that"},
		"of somebody else":   {func(_ *desk, r *request) { r.verdict.UserID = "@eve:example.org" }, "I am not sure that"},
		"of an unsigned one": {func(_ *desk, r *request) { r.verdict.Code = cryptohook.CodeUnsignedDevice }, "That device does not belong to"},
		"of another device":  {func(_ *desk, r *request) { r.deviceID = "WEB" }, "names another device"},
		"clear, not signed":  {func(_ *desk, r *request) { r.deviceID, r.verdict.Code = "WEB", cryptohook.CodeSentInClear }, "That device does not belong to"},
		"clear, deleted":     {func(_ *desk, r *request) { r.deviceID, r.verdict.Code = "OLD", cryptohook.CodeSentInClear }, "That device does not belong to"},
		"clear, unknown":     {func(_ *desk, r *request) { r.deviceID, r.verdict.Code = "NONE", cryptohook.CodeSentInClear }, "That device does not belong to"},
		"of no identity":     {func(d *desk, r *request) { d.reports[r.userID].MasterKey = "" }, "has no public key that I could verify"},
		"of an unknown":      {func(d *desk, r *request) { delete(d.reports, r.userID) }, "has no public key that I could verify"},
		"of a changed one":   {func(d *desk, r *request) { d.reports[r.userID].Standing = cryptohook.StandingViolation }, "is not the one that was verified before"},
		"of a violated one":  {func(_ *desk, r *request) { r.verdict.Code = cryptohook.CodeVerificationViolation }, "is not the one that was verified before"},
		"of the bot's own":   {func(d *desk, r *request) { r.userID = d.bot.client.UserID }, "I do not verify other devices of my own account"},
		"with an odd ID":     {func(_ *desk, r *request) { r.txnID = "with a space" }, ""},
		"with a very long ID": {func(_ *desk, r *request) {
			r.txnID = id.VerificationTransactionID(strings.Repeat("x", longestTransactionID+1))
		}, ""},
	} {
		d := newTestDesk(t)
		d.person("@alice:example.org")
		events := d.request("@alice:example.org", "$one", func(r *request) { c.change(d, r) })
		said := saidAll(events)
		switch {
		case c.says == "" && said != "", c.says != "" && !strings.Contains(said, c.says):
			t.Errorf("%s: said %s", name, said)
		case c.says == "" || strings.Contains(c.says, "about to"):
		case !strings.Contains(said, "m.key.verification.cancel"):
			t.Errorf("%s: the app was not told: %s", name, said)
		case d.left() != "":
			t.Errorf("%s: %s", name, d.left())
		}
	}
}

func TestVerificationsAreLimited(t *testing.T) {
	d := newTestDesk(t)
	for i := range openAtMost {
		userID := id.NewUserID(fmt.Sprintf("guest%d", i), "example.org")
		d.person(userID)
		d.request(userID, id.VerificationTransactionID(fmt.Sprintf("$guest%d", i)))
	}
	d.person("@alice:example.org")
	if said := saidAll(d.request("@alice:example.org", "$one")); !strings.Contains(said, "I have no time for") || len(d.v.open) != openAtMost {
		t.Errorf("said %s; %d are open", said, len(d.v.open))
	}
	if said := saidAll(d.request("@guest0:example.org", "$again")); !strings.Contains(said, "is under way already") {
		t.Errorf("said %s", said)
	}
	for i := range requestsAtMost {
		said := saidAll(d.request("@alice:example.org", id.VerificationTransactionID(fmt.Sprintf("$more%d", i))))
		if answered := said != ""; answered != (i < requestsAtMost-1) {
			t.Errorf("request %d was answered: %s", i+2, said)
		}
	}
	d.now = d.now.Add(requestPeriod)
	d.v.expire(t.Context())
	if said := saidAll(d.request("@alice:example.org", "$later")); !strings.Contains(said, "are about to verify each other") {
		t.Errorf("an hour later: %s", said)
	}
}

// Who knows the bot's name can send it events between devices, under any name that a homeserver makes up.
func TestEventsBetweenDevicesAreLimited(t *testing.T) {
	d := newTestDesk(t)
	between := func(r *request) { r.roomID = "" }
	for i := range betweenDevicesAtMost {
		d.request(id.NewUserID(fmt.Sprintf("guest%d", i), "example.org"), id.VerificationTransactionID(fmt.Sprintf("m%d", i)), between)
	}
	d.person("@alice:example.org")
	if said := saidAll(d.request("@alice:example.org", "one-more", between)); said != "" {
		t.Errorf("one request too many was answered: %s", said)
	}
	if said := saidAll(d.request("@alice:example.org", "$one")); !strings.Contains(said, "are about to verify each other") {
		t.Errorf("a request in a room was answered: %s", said)
	}
	for txnID, waits := range map[string]int{"$one": 1, "of nobody": 0, "": 0} {
		evt := &event.Event{Sender: "@eve:example.org", Type: event.ToDeviceVerificationCancel, Content: event.Content{Raw: map[string]any{"transaction_id": txnID}}}
		d.v.onToDevice(t.Context(), evt)
		if len(d.v.arrived) != waits {
			t.Errorf("%d events of the transaction %q wait", len(d.v.arrived), txnID)
		}
		for len(d.v.arrived) > 0 {
			<-d.v.arrived
		}
	}
}

func TestOperatorsDecideInEveryStage(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	d.person("@bella:example.org")
	expect := func(r response, detail string) {
		t.Helper()
		if r.detail != detail {
			t.Errorf("%q instead of %q: %s", r.detail, detail, r.words.plain())
		}
	}
	expect(d.decide("@olga:example.org", "confirm"), "none_open")
	d.request("@alice:example.org", "$one")
	expect(d.decide("@olga:example.org", "confirm"), "early")
	expect(d.decide("@olga:example.org", "confirm", "@bella:example.org"), "not_open")
	d.shows("$one")
	code := d.code("$one")
	expect(d.decide("@alice:example.org", "confirm", code), "own")
	d.request("@bella:example.org", "$two")
	expect(d.decide("@olga:example.org", "confirm"), "no_code")
	expect(d.decide("@olga:example.org", "confirm", "@alice:example.org"), "no_code")
	expect(d.decide("@olga:example.org", "confirm", "@bella:example.org"), "early")
	expect(d.decide("@olga:example.org", "confirm", "@bella:example.org", code), "other_person")
	expect(d.decide("@olga:example.org", "confirm", otherCode(code)), "other_code")
	expect(d.decide("@olga:example.org", "confirm", "yes"), "not_a_code")
	expect(d.decide("@olga:example.org", "deny"), "which")
	expect(d.decide("@olga:example.org", "deny", "@bella:example.org"), "called_off")
	if len(d.verified) > 0 {
		t.Fatalf("verified already: %v", d.verified)
	}
	expect(d.decide("@olga:example.org", "confirm", "@alice:example.org", code), "verified @alice:example.org "+alicesKey.String())
	if d.verified["@alice:example.org"] != alicesKey {
		t.Errorf("verified: %v", d.verified)
	}
	expect(d.decide("@olga:example.org", "confirm", "@alice:example.org"), "not_open")
	if left := d.left(); left != "" {
		t.Error(left)
	}
}

// otherCode is a code that differs from one in its last digit.
func otherCode(code string) string {
	last := code[len(code)-1]
	return code[:len(code)-1] + string('0'+(last-'0'+1)%10)
}

// A server that keeps an operator's confirmation back, and delivers it when another verification is open, has nobody verified by it.
func TestConfirmationCountsForNoLaterVerification(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	d.request("@alice:example.org", "$one")
	d.shows("$one")
	kept := d.code("$one")
	d.decide("@olga:example.org", "deny")
	d.request("@alice:example.org", "$two")
	d.shows("$two")
	if now := d.code("$two"); !isCode(now) || now == kept {
		t.Fatalf("the first code was %s, the second %s", kept, now)
	}
	for _, args := range [][]string{{kept}, {"@alice:example.org"}, {"@alice:example.org", kept}, nil} {
		if r := d.decide("@olga:example.org", "confirm", args...); r.outcome != outcomeRefused || len(d.verified) > 0 || d.v.open["$two"] == nil {
			t.Errorf("confirm %v: %s; verified: %v", args, r.words.plain(), d.verified)
		}
	}
}

func TestCodesAreShownWhereTheyAreNeeded(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	d.request("@alice:example.org", "$one")
	if code := d.code("$one"); code != "" {
		t.Errorf("there is the code %s before there is anything to compare", code)
	}
	said := saidAll(d.says(func() { d.shows("$one") }))
	if !strings.Contains(said, "!trust confirm "+d.code("$one")) {
		t.Errorf("said %s", said)
	}
}

func TestPinnedOperatorConfirmsForThemselves(t *testing.T) {
	d := newTestDesk(t)
	d.person("@olga:example.org")
	d.bot.config.Trust.VerifiedUsers = map[id.UserID]id.Ed25519{"@olga:example.org": otherKey}
	d.request("@olga:example.org", "$one")
	d.shows("$one")
	if r := d.decide("@olga:example.org", "confirm", d.code("$one")); r.detail != "own" {
		t.Errorf("with another key: %s", r.words.plain())
	}
	d.bot.config.Trust.VerifiedUsers["@olga:example.org"] = alicesKey
	if r := d.decide("@olga:example.org", "confirm", d.code("$one")); !strings.Contains(r.words.plain(), "is verified now") {
		t.Errorf("with that key: %s", r.words.plain())
	}
}

// Nothing is signed but what was compared.
func TestNothingElseIsVerifiedThanWhatWasCompared(t *testing.T) {
	for name, c := range map[string]struct {
		change func(d *desk)
		why    string
	}{
		"another master key":             {func(d *desk) { d.reports["@alice:example.org"].MasterKey = otherKey }, "identity_changed"},
		"no identity":                    {func(d *desk) { delete(d.reports, "@alice:example.org") }, "identity_changed"},
		"a violation":                    {func(d *desk) { d.reports["@alice:example.org"].Standing = cryptohook.StandingViolation }, "identity_changed"},
		"mautrix would sign another key": {func(d *desk) { d.cached["@alice:example.org"] = otherKey }, "identity_changed"},
		"the device is deleted":          {func(d *desk) { d.reports["@alice:example.org"].Devices[0].Deleted = true }, "device_gone"},
		"the device is not signed":       {func(d *desk) { d.reports["@alice:example.org"].Devices[0].SignedByOwner = false }, "device_gone"},
	} {
		d := newTestDesk(t)
		d.person("@alice:example.org")
		d.request("@alice:example.org", "$one")
		d.shows("$one")
		c.change(d)
		r := d.decide("@olga:example.org", "confirm", d.code("$one"))
		if r.detail != c.why || r.outcome != outcomeRefused || slices.Contains(d.calls, "confirm") || len(d.verified) > 0 {
			t.Errorf("%s: %q; the helper was told %v: %s", name, r.detail, d.calls, r.words.plain())
		}
		if left := d.left(); left != "" {
			t.Errorf("%s: %s", name, left)
		}
	}
}

func TestHelperThatPanicsEndsOneVerification(t *testing.T) {
	d := newTestDesk(t)
	d.person("@alice:example.org")
	d.person("@bella:example.org")
	d.request("@bella:example.org", "$other")
	d.request("@alice:example.org", "$one")
	d.shows("$one")
	d.panics = "confirm"
	if r := d.decide("@olga:example.org", "confirm", d.code("$one")); !strings.Contains(r.words.plain(), "something went wrong on my side") {
		t.Errorf("said %s", r.words.plain())
	}
	if d.v.open["$one"] != nil || d.v.open["$other"] == nil || len(d.verified) > 0 {
		t.Errorf("open: %v, verified: %v", d.v.open, d.verified)
	}
}

// The helper signs, and then tells the person's app. If that fails, the person is verified all the same.
func TestVerificationThatBreaksOffSaysWhatIsTrue(t *testing.T) {
	for name, c := range map[string]struct {
		signed  bool
		unasked error
		says    string
	}{
		"before it was signed":  {false, nil, "Nobody was verified by it"},
		"after it was signed":   {true, nil, "is verified now"},
		"and nobody knows when": {true, errors.New("the homeserver is gone"), "I cannot tell whether that was noted"},
	} {
		d := newTestDesk(t)
		d.person("@alice:example.org")
		d.request("@alice:example.org", "$one")
		d.shows("$one")
		d.confirming = func(*verificationhelper.VerificationTransaction) error {
			if c.signed {
				d.reports["@alice:example.org"].Standing = cryptohook.StandingVerified
			}
			d.unasked = c.unasked
			return errors.New("the event could not be sent")
		}
		r := d.decide("@olga:example.org", "confirm", d.code("$one"))
		if !strings.Contains(r.words.plain(), c.says) {
			t.Errorf("%s: said %s", name, r.words.plain())
		}
		if left := d.left(); left != "" {
			t.Errorf("%s: %s", name, left)
		}
	}
}

// What an operator has confirmed before the person had is in the audit table as what came of it in the end.
func TestAuditSaysWhatBecameOfAConfirmation(t *testing.T) {
	for name, c := range map[string]struct {
		end     func(d *desk)
		outcome string
		detail  string
	}{
		"the person confirms": {
			func(d *desk) {
				d.v.open["$one"].done = true
				d.v.follow(t.Context(), d.v.open["$one"])
			}, auditDone, verifiedDetail + "@alice:example.org " + alicesKey.String(),
		},
		"the person does not": {
			func(d *desk) {
				d.now = d.now.Add(verificationLasts)
				d.v.expire(t.Context())
			}, string(outcomeFailed), failedDetail + "@alice:example.org",
		},
	} {
		d := newTestDesk(t)
		d.person("@alice:example.org")
		d.request("@alice:example.org", "$one")
		d.shows("$one")
		d.confirming = func(*verificationhelper.VerificationTransaction) error { return nil }
		r := d.decide("@olga:example.org", "confirm", d.code("$one"))
		if !strings.HasPrefix(r.detail, waitingDetail) {
			t.Fatalf("%s: %q", name, r.detail)
		}
		line := &auditLine{eventID: "$order", at: d.now, sender: "@olga:example.org", command: "confirm", outcome: auditDone, detail: r.detail}
		if err := d.bot.reviser.records.putAudit(t.Context(), line); err != nil {
			t.Fatal(err)
		}
		c.end(d)
		noted, err := d.bot.reviser.records.auditOf(t.Context(), "$order")
		if err != nil || noted.outcome != c.outcome || noted.detail != c.detail {
			t.Errorf("%s: noted %+v (%v)", name, noted, err)
		}
	}
}

func TestEmojisHaveNamesInEveryLanguage(t *testing.T) {
	sas := &shortString{emojis: []rune("🐶👍"), names: []string{"Dog", "Thumbs Up"}, numbers: []int{1, 2, 3}}
	for language, want := range map[string]string{"en": "🐶\ufe0f Dog   👍\ufe0f Thumbs Up", "de": "🐶\ufe0f Hund   👍\ufe0f Daumen Hoch"} {
		if said := speeches[language].describeEmojis(sas); !strings.Contains(said, want) || !strings.Contains(said, "1 2 3") {
			t.Errorf("%s: %s", language, said)
		}
	}
}

// What a camera reads has to be one segment of bytes, also when there are many digits in it.
func TestPictureHoldsTheBytes(t *testing.T) {
	for _, txnID := range []id.VerificationTransactionID{"$7abcDEF-_", "m12345678901234567890123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJKLMNOPQRSTUVWXYZ"} {
		code := verificationhelper.NewQRCode(verificationhelper.QRCodeModeCrossSigning, txnID, [32]byte{0xff, 0x80}, [32]byte(bytes.Repeat([]byte("7"), 32)))
		picture, err := paintCode("verification.png", code.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		painted, err := png.Decode(bytes.NewReader(picture.data))
		if err != nil {
			t.Fatal(err)
		}
		if painted.Bounds().Dx() != picture.width || painted.Bounds().Dy() != picture.height {
			t.Errorf("%v pixels, said %d×%d", painted.Bounds(), picture.width, picture.height)
		}
		segments, _ := readQR(t, picture.data).GetResultMetadata()[gozxing.ResultMetadataType_BYTE_SEGMENTS].([][]byte)
		if len(segments) != 1 || !bytes.Equal(segments[0], code.Bytes()) {
			t.Errorf("%s: read %d segments: %x", txnID, len(segments), segments)
		}
	}
}

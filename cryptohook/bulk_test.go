package cryptohook

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// signingKey gives the ed25519 key of a living device, or the empty one.
func (s *store) signingKey(ctx context.Context, userID id.UserID, deviceID id.DeviceID) (id.Ed25519, error) {
	keys, err := s.signingKeys(ctx, []id.UserID{userID})
	return keys[s.storedDevice(userID, deviceID)], err
}

func TestRowsThatAreTheSameComeIntoDifferentStatements(t *testing.T) {
	self := func(n int) int { return n }
	for name, tc := range map[string]struct {
		rows []int
		want string
	}{
		"none":           {nil, "[]"},
		"one":            {[]int{1}, "[[1]]"},
		"few":            {[]int{1, 2, 3, 4, 5}, "[[1 2 3 4] [5]]"},
		"the same":       {[]int{1, 2, 1, 1}, "[[1] [2] [1] [1]]"},
		"again at last":  {[]int{1, 2, 3, 4, 5, 6, 7, 8, 5}, "[[1 2 3 4] [5 6 7 8] [5]]"},
		"not again then": {[]int{1, 1, 2, 3, 4}, "[[1] [1 2 3 4]]"},
	} {
		if got := fmt.Sprint(slices.AppendSeq([][]int{}, perInsert(tc.rows, self))); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
	var many []int
	for i := range 3*insertSizes[0] + 7 {
		many = append(many, i)
	}
	var all []int
	for piece := range perInsert(many, self) {
		if all = append(all, piece...); !slices.Contains(insertSizes[:], len(piece)) {
			t.Errorf("a statement of %d rows", len(piece))
		}
	}
	if !slices.Equal(all, many) {
		t.Errorf("of %d rows %d come", len(many), len(all))
	}
	for range perInsert(many, self) {
		break // whoever has had enough gets no more
	}
}

// statementCount counts the statements of a database.
type statementCount struct {
	dbutil.DatabaseLogger
	word        string
	count, sets atomic.Int64
}

func (c *statementCount) QueryTiming(_ context.Context, method, query string, _ []any, _ int, _ time.Duration, _ error) {
	switch {
	case method == "Commit":
		c.sets.Add(1)
	case (method == "Exec" || method == "Query" || method == "QueryRow") && strings.Contains(query, c.word):
		c.count.Add(1)
	}
}

// statements counts those that have a word in them, and the commits.
func (w *trustWorld) statements(word string) *statementCount {
	count := &statementCount{DatabaseLogger: dbutil.NoopLogger, word: word}
	w.db.Log, w.hook.store.Log, w.hook.uow.DB.Log = count, count, count
	return count
}

// What an answer holds about many takes a few statements, not some for each: the numbers of rows are no multiples of anything.
func TestAnswerAboutManyIsStoredInFewStatements(t *testing.T) {
	w := newTrustWorld(t)
	asked, answer := answerAbout(157, 2)
	for _, round := range []string{"first", "again"} {
		count := w.statements("sendertrust_")
		w.observe(asked, answer)
		if got := count.count.Load(); got > 60 {
			t.Errorf("%s: %d statements about 157 users with 2 devices each", round, got)
		}
	}
	if rows := w.countIn("sendertrust_device"); rows != 2*157 {
		t.Errorf("there are %d devices", rows)
	}
}

func (w *trustWorld) countIn(table string) (rows int) {
	w.t.Helper()
	if err := w.db.QueryRow(w.ctx, "SELECT COUNT(*) FROM "+table).Scan(&rows); err != nil {
		w.t.Fatal(err)
	}
	return rows
}

// answerAbout gives an answer about so many users with so many devices each.
func answerAbout(users, devices int) (*mautrix.ReqQueryKeys, *keyQuery) {
	server := &keyServer{actors: make(map[id.UserID]*actor)}
	asked := &mautrix.ReqQueryKeys{DeviceKeys: make(mautrix.DeviceKeysRequest)}
	for i := range users {
		a := server.add(newActor(id.NewUserID(fmt.Sprint("user", i), "test")))
		for n := range devices {
			a.addDevice(id.DeviceID(fmt.Sprint("DEVICE", n)))
		}
		asked.DeviceKeys[a.userID] = nil
	}
	return asked, readAnswer(server.query(asked))
}

func readAnswer(answer object) *keyQuery {
	var read keyQuery
	if err := json.Unmarshal(rawJSON(answer), &read); err != nil {
		panic(err)
	}
	return &read
}

// observe stores an answer.
func (w *trustWorld) observe(asked *mautrix.ReqQueryKeys, answer *keyQuery) {
	w.t.Helper()
	users := must(w.hook.checkPublished(w.ctx, asked, answer))
	if err := w.hook.learn(w.ctx, func(ctx context.Context) error { return w.hook.storePublished(ctx, users, answer) }); err != nil {
		w.t.Fatal(err)
	}
}

// More users than a statement takes parameters for.
func TestAnswerAboutMoreUsersThanAStatementTakesIsStoredWhole(t *testing.T) {
	w := newTrustWorld(t)
	asked, answer := answerAbout(perStatement+3, 1)
	w.observe(asked, answer)
	for _, table := range []string{"sendertrust_device", "sendertrust_identity", "sendertrust_identity_key", "sendertrust_signature"} {
		if rows := w.countIn(table); rows != perStatement+3 {
			t.Errorf("%s has %d rows", table, rows)
		}
	}
}

// oneByOne stores what a user publishes as it was done before there were statements about many, row by row: what TestManyAreStoredAsOneByOne
// compares with.
type oneByOne struct{ *trustWorld }

func (o oneByOne) exec(query string, args ...any) int64 {
	o.t.Helper()
	return must(must(o.db.Exec(o.ctx, query, args...)).RowsAffected())
}

func (o oneByOne) text(query string, args ...any) (text string, known bool) {
	o.t.Helper()
	err := o.db.QueryRow(o.ctx, query, args...).Scan(&text)
	if err != nil && ignoreNoRows(err) != nil {
		o.t.Fatal(err)
	}
	return text, err == nil
}

func (o oneByOne) store(user *publishedUser, answer *keyQuery) {
	o.t.Helper()
	o.storeDevices(user)
	store, now := o.hook.store, o.clock.Now()
	known := must(store.identity(o.ctx, user.userID))
	if known == nil && user.identity == nil {
		return
	}
	identity := known
	if user.identity != nil {
		identity = &Identity{UserID: user.userID}
		if known != nil {
			*identity = *known
		}
		identity.merge(user.identity, must(store.isWithdrawn(o.ctx, user.userID, user.identity.masterKey)))
		identity.PinnedKey = o.hook.options.VerifiedUsers[user.userID]
		if known == nil || *known != *identity {
			o.exec(upsertIdentityQuery, identity.UserID, identity.MasterKey, identity.FirstMasterKey, identity.SelfSigningKey, identity.VerifiedBy,
				identity.WasVerified, identity.PinnedKey, now.UnixMilli())
		}
		var selfSigning json.RawMessage
		if user.identity.selfSigningKey != "" {
			selfSigning = answer.SelfSigningKeys[user.userID]
		}
		// RETURNING, since the number of rows is 0 with it on SQLite.
		if _, changed := o.text(upsertIdentityKeyQuery, user.userID, user.identity.masterKey, now.UnixMilli(), asKept(answer.MasterKeys[user.userID]),
			user.identity.selfSigningKey, asKept(selfSigning)); changed {
			o.exec(trimIdentityKeysQuery, user.userID, MaxIdentityChanges)
		}
	}
	if err := store.rejudge(o.ctx, identity, o.hook.anchor(), now); err != nil {
		o.t.Fatal(err)
	}
}

func (o oneByOne) storeDevices(user *publishedUser) {
	o.t.Helper()
	var valid []*publishedDevice
	var kept []id.DeviceID
	for _, device := range user.devices {
		if device.fault != nil {
			continue
		}
		known, living := o.text("SELECT signing_key FROM sendertrust_device WHERE user_id=$1 AND device_id=$2 AND deleted=false", user.userID, device.deviceID)
		if living && known != device.signingKey.String() {
			kept = append(kept, device.deviceID)
			continue
		}
		valid = append(valid, device)
	}
	if user.complete {
		o.exec("UPDATE sendertrust_device SET deleted=true WHERE user_id=$1", user.userID)
	}
	for _, deviceID := range kept {
		o.exec(keepDeviceQuery, user.userID, deviceID)
	}
	for _, device := range valid {
		o.exec(upsertDeviceQuery, user.userID, device.deviceID, device.identityKey, device.signingKey, string(device.raw), false)
		for _, signer := range device.signers {
			o.exec(insertSenderQuery, user.userID, device.identityKey, device.signingKey)
			o.exec(`
				INSERT INTO sendertrust_signature (sender_id, self_signing_key, device_keys)
				SELECT id, $4, CASE
					WHEN EXISTS (SELECT 1 FROM sendertrust_identity WHERE user_id=$1 AND self_signing_key=$4) THEN $5
					WHEN (SELECT COUNT(*) FROM sendertrust_signature kept WHERE kept.sender_id=sendertrust_sender.id AND kept.device_keys IS NOT NULL)<8 THEN $5
				END
				FROM sendertrust_sender WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3
				ON CONFLICT (sender_id, self_signing_key) DO UPDATE SET device_keys=excluded.device_keys
					WHERE sendertrust_signature.device_keys IS NULL AND excluded.device_keys IS NOT NULL
			`, user.userID, device.identityKey, device.signingKey, signer, asKept(device.raw))
		}
	}
}

// learnt gives everything that key queries change, without the numbers of rows.
func (w *trustWorld) learnt() (rows []string) {
	w.t.Helper()
	for _, query := range []string{
		"SELECT 'device ' || user_id || ' ' || device_id || ' ' || identity_key || ' ' || signing_key || ' ' || device_keys || CASE WHEN deleted THEN ' deleted' ELSE '' END FROM sendertrust_device",
		`SELECT 'identity ' || user_id || ' ' || master_key || ' ' || first_master_key || ' ' || self_signing_key || ' ' || verified_by || ' ' ||
			CASE WHEN was_verified THEN 'was' ELSE '' END || ' ' || pinned_key || ' ' || updated_at_ms FROM sendertrust_identity`,
		`SELECT 'key ' || user_id || ' ' || master_key || ' ' || seen_at_ms || ' ' || COALESCE(master_object, '') || ' ' || self_signing_key || ' ' ||
			COALESCE(self_signing_object, '') FROM sendertrust_identity_key`,
		"SELECT 'sender ' || user_id || ' ' || identity_key || ' ' || signing_key FROM sendertrust_sender",
		`SELECT 'signature ' || user_id || ' ' || identity_key || ' ' || signing_key || ' ' || self_signing_key || ' ' || COALESCE(device_keys, '')
			FROM sendertrust_signature JOIN sendertrust_sender ON id=sender_id`,
		`SELECT 'claim ' || session_id || ' ' || sender || ' ' || state || ' ' || master_key || ' ' || retry_count || ' ' || COALESCE(next_retry_time_ms, 0) || ' ' ||
			updated_at_ms FROM sendertrust_session`,
	} {
		rows = append(rows, scanStrings(w.db.RawDB, query)...)
	}
	slices.Sort(rows)
	return rows
}

// strangeServer publishes what changes from one answer to the next, in every odd way.
type strangeServer struct {
	*rand.Rand
	server *keyServer
	bot    *actor
	actors []*actor
	spare  map[id.UserID][]*actorDevice
	former map[id.UserID][]jsonSigner
	names  map[jsonSigner]string
	// selfSigningIsSigned: every self-signing key is signed by its master key.
	selfSigningIsSigned bool
}

func newStrangeServer(seed uint64, bot *actor) *strangeServer {
	s := &strangeServer{
		Rand: rand.New(rand.NewPCG(seed, 1)), server: &keyServer{actors: make(map[id.UserID]*actor)}, bot: bot,
		spare: make(map[id.UserID][]*actorDevice), former: make(map[id.UserID][]jsonSigner), names: make(map[jsonSigner]string),
	}
	// The last two are one to PostgreSQL.
	for _, userID := range []id.UserID{"@a:test", "@b:test", "@c:test", "@d:test", "@\x00:test", "@\ufffd:test"} {
		a := s.server.add(newActor(userID))
		s.actors = append(s.actors, a)
		// So are the devices' last two.
		for _, deviceID := range []id.DeviceID{"A", "B", "C", "\x00", "\ufffd"} {
			a.addDevice(deviceID)
		}
		s.spare[userID], a.devices = a.devices, nil
	}
	return s
}

func (s *strangeServer) perhaps(often float64) bool { return s.Float64() < often }

func (s *strangeServer) turn(a *actor) {
	if restless := a == s.actors[0]; restless || s.perhaps(0.3) {
		s.names[a.selfSigning] = a.selfSigningKey().String()
		s.former[a.userID] = append(s.former[a.userID], a.selfSigning)
		former := a.master
		if a.reset(); !restless && s.perhaps(0.5) {
			a.master = former // only the self-signing key is another one
		}
	}
	a.verifiedBy = nil
	if s.perhaps(0.4) {
		a.verifiedBy = s.bot
	}
	a.hidden = s.perhaps(0.15)
	a.devices = nil
	for i, device := range s.spare[a.userID] {
		switch {
		case s.perhaps(0.05):
			*device = *(&actor{userID: a.userID}).addDevice(device.deviceID) // other keys under its name
			device.owner = a
		case s.perhaps(0.1):
			device.account = s.spare[s.actors[s.IntN(len(s.actors))].userID][s.IntN(i+1)].account // another one's keys
		}
		if device.crossSigned = s.perhaps(0.8); s.perhaps(0.7) {
			a.devices = append(a.devices, device)
		}
	}
}

// answer gives the next answer, and what it answers.
func (s *strangeServer) answer() (*mautrix.ReqQueryKeys, object) {
	asked := &mautrix.ReqQueryKeys{DeviceKeys: make(mautrix.DeviceKeysRequest)}
	for _, a := range s.actors {
		s.turn(a)
		if asked.DeviceKeys[a.userID] = nil; s.perhaps(0.2) {
			asked.DeviceKeys[a.userID] = mautrix.DeviceIDList{"A"}
		}
	}
	answer := s.server.query(asked)
	for _, a := range s.actors {
		for _, keys := range answer["device_keys"].(object)[a.userID.String()].(object) {
			s.spoil(a, keys.(object))
		}
		if selfSigning, ok := answer["self_signing_keys"].(object)[a.userID.String()].(object); ok && s.perhaps(0.1) && !s.selfSigningIsSigned {
			putSignature(selfSigning, a.userID, a.masterKey().String(), forgedSignature())
		}
		if master, ok := answer["master_keys"].(object)[a.userID.String()].(object); ok && s.perhaps(0.1) {
			putSignature(master, a.userID, "LONG", strings.Repeat("A", maxEvidence))
		}
	}
	return asked, answer
}

func (s *strangeServer) spoil(a *actor, keys object) {
	if s.perhaps(0.3) {
		for _, former := range s.former[a.userID] {
			signInto(keys, a.userID, s.names[former], former)
		}
	}
	switch {
	case s.perhaps(0.05):
		keys["unsigned"] = object{"long": strings.Repeat("A", maxEvidence)}
	case s.perhaps(0.05):
		keys["device_id"] = "OTHER"
	case s.perhaps(0.05):
		putSignature(keys, a.userID, a.selfSigningKey().String(), forgedSignature())
	}
}

func TestManyAreStoredAsOneByOne(t *testing.T) {
	for seed := range uint64(2) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			together, apart := newTrustWorld(t), oneByOne{newTrustWorld(t)}
			s := newStrangeServer(seed, together.bot)
			apart.hook.mach.CrossSigningKeys = together.hook.mach.CrossSigningKeys
			pins := map[id.UserID]id.Ed25519{"@d:test": s.actors[3].masterKey()}
			together.hook.options.VerifiedUsers, apart.hook.options.VerifiedUsers = pins, pins
			states := make(map[string]bool)
			for round := range 2 * MaxIdentityChanges {
				together.clock.advance(time.Second)
				apart.clock.advance(time.Second)
				asked, said := s.answer()
				answer := readAnswer(said)
				users := must(together.hook.checkPublished(together.ctx, asked, answer))
				if err := together.hook.learn(together.ctx, func(ctx context.Context) error { return together.hook.storePublished(ctx, users, answer) }); err != nil {
					t.Fatal(err)
				}
				for _, user := range users {
					apart.store(user, answer)
				}
				if got, want := together.learnt(), apart.learnt(); !slices.Equal(got, want) {
					t.Fatalf("round %d, stored together:\n%s\none by one:\n%s", round, missing(got, want), missing(want, got))
				}
				for _, w := range []*trustWorld{together, apart.trustWorld} {
					s.livesOn(w, round)
				}
				for _, state := range scanStrings(together.db.RawDB, "SELECT DISTINCT state FROM sendertrust_claim") {
					states[state] = true
				}
			}
			if len(states) != 4 {
				t.Errorf("there were only sessions that are %v", states)
			}
		})
	}
}

// livesOn gives the users sessions that they have proven, and withdraws a verification.
func (s *strangeServer) livesOn(w *trustWorld, round int) {
	w.t.Helper()
	a := s.actors[round%len(s.actors)]
	identity := must(w.hook.store.identity(w.ctx, a.userID))
	if identity == nil || identity.SelfSigningKey == "" {
		return
	}
	err := w.hook.store.write(w.ctx, func(ctx context.Context) error {
		for _, device := range s.spare[a.userID] {
			state := w.hook.anchor().stateOf(identity.MasterKey, identity)
			err := w.hook.store.putClaim(ctx, &SenderData{
				SessionID: id.SessionID(fmt.Sprint(round, device.deviceID)), SenderKey: device.senderKey(), SigningKey: device.signingKey(), Sender: a.userID,
				Source: SourceDirect, State: state, MasterKey: identity.MasterKey, ReceivedAt: w.clock.Now(), UpdatedAt: w.clock.Now(),
			})
			if err != nil {
				return err
			}
		}
		if round%5 != 0 {
			return nil
		}
		if err := w.hook.store.withdraw(ctx, a.userID, identity.MasterKey); err != nil {
			return err
		}
		identity.VerifiedBy, identity.WasVerified = "", false
		return w.hook.store.putIdentity(ctx, identity, w.clock.Now())
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// missing gives the rows of one that the other lacks.
func missing(rows, other []string) string {
	var only []string
	for _, row := range rows {
		if _, found := slices.BinarySearch(other, row); !found {
			only = append(only, row[:min(len(row), 300)])
		}
	}
	return strings.Join(only, "\n")
}

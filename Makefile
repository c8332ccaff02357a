# goolm is the pure-Go implementation of Olm in mautrix. Without it mautrix is built on the C library libolm, which nobody
# maintains any more and which is not needed: "olm/olm.h: No such file" means that this tag was left out.
TAGS := goolm
GO   := go

.DEFAULT_GOAL := build

.PHONY: build
build: ## the program, ./sendertrust
	@./e2e/setup.sh go >/dev/null
	$(GO) build -tags $(TAGS) -o sendertrust .

.PHONY: demo
demo: ## a conversation with the bot on a private homeserver; KEEP=1 leaves it running
	@./e2e/setup.sh go synapse >/dev/null
	@$(GO) build -tags $(TAGS) -o .cache/demo ./e2e/demo
	@exec .cache/demo

.PHONY: pictures
pictures: ## take the pictures in docs/pictures again: the bot in a desktop client (a minute; Debian's nheko, on a screen that nobody sees)
	@./e2e/setup.sh go synapse desktop >/dev/null
	@$(GO) build -tags $(TAGS) -o .cache/pictures ./e2e/pictures
	@exec .cache/pictures

.PHONY: test
test: ## all tests: units with the race detector, again on PostgreSQL, then Synapse, the bot as a process, and Element's crypto
	@./e2e/setup.sh go postgres >/dev/null
	$(GO) vet -tags $(TAGS) ./...
	@$(MAKE) --no-print-directory -j4 -Otarget test-races test-in-turn test-postgres installed
	$(GO) test -tags $(TAGS) -count 1 -p 2 -v -timeout 12m $$($(GO) list -tags $(TAGS) ./e2e/... | grep -v '/soak$$')
	$(GO) test -tags $(TAGS) -count 1 -v -timeout 8m ./e2e/soak

# What does one thing after the other: the race detector has nothing to find there, and takes its time.
IN_TURN := ^Fuzz|ForgeriesProve|HistoryIsJudged|EveryStoryOfTheTruth|EveryMeetingOfTwoKeys|FailedReadBreaks|WithoutTheGate|KilledAtAnyMoment|RoomStateWaits|OwnerThatIsNotHeardOf|RoleThatMayNot|FailedCommit|ManyAreStoredAsOneByOne|MautrixKnows|StormOf|ReceivedTogether|AnswerAbout|OpenSession|EveryByteOfAProof|ForwardedKeys|ProofsOf|EveryEdge|KeyExports|BackupIsMade|BackupEntries|BundlesThat|ExamineAgrees|VerdictRests|UndecryptableEventsOf

# What asks the database for the same over and over, to be sure of what is made of it, and what asks it for little.
LOGIC := ForgeriesProve|EveryStoryOfTheTruth|EveryMeetingOfTwoKeys|SixtyFourAtOnce|StormOf|EveryByteOfAProof|ForwardedKeys|KeyExports|ProofsOf|BackupIsMade|BackupEntries|ExamineAgrees|BundlesThat|OwnIdentityIsJudged|EveryEdge|WithoutTheGate|UndecryptableEventsOf

# The race detector takes more than half of its time in the arithmetic of signatures, where nothing is shared: it looks at who calls that.
RACE := -race -gcflags=crypto/internal/fips140/...=-race=false -gcflags=filippo.io/edwards25519/...=-race=false

# What the end-to-end tests need is installed while the others run.
.PHONY: installed
installed:
	@./e2e/setup.sh synapse element >/dev/null

# They wait for each other's processors, and the disk.
.PHONY: test-races test-in-turn test-postgres
test-races:
	$(GO) test -tags $(TAGS) $(RACE) -timeout 10m -skip '$(IN_TURN)' . ./bot/... ./cryptohook/... ./bench/...
test-in-turn:
	$(GO) test -tags $(TAGS) -timeout 8m -run '$(IN_TURN)' -skip HistoryIsJudged . ./bot ./cryptohook
	$(GO) test -tags $(TAGS) -v -run HistoryIsJudged -timeout 10m ./cryptohook $(HISTORIES) -rapid.checks=65 -rapid.seed=2026
test-postgres:
	TEST_DATABASE=postgres $(GO) test -tags $(TAGS) -short -timeout 8m -skip '$(LOGIC)' ./bot ./cryptohook

# 100,000 steps. make test takes a sixteenth of them, the same ones each time, so that it fails for what has changed and for nothing else.
HISTORIES := -rapid.nofailfile -rapid.checks=1040 -rapid.steps=100

.PHONY: histories
histories: ## 100,000 steps of random histories, other ones each time
	$(GO) test -tags $(TAGS) -count 1 -v -run HistoryIsJudged -timeout 10m ./cryptohook $(HISTORIES)

.PHONY: test-unit
test-unit: ## the tests that need no homeserver
	@./e2e/setup.sh go postgres >/dev/null
	@$(MAKE) --no-print-directory -j3 -Otarget test-races test-in-turn test-postgres

# What the tests of trust are worth: the code is broken in every small way, one at a time, and they have to notice.
MUTATED  := steps.go,senderdata.go,identity.go,verification.go,verdict.go
MUTATION := EveryEdge|EveryStory|EveryMeeting|EveryCode|Backoff|Jitter|Derivation|Published|ProvenRow|TrustOrder|Merge|Imported|DirectSender|Rejection|EverySource|LivingClaims|Identity|Judge|Forged|Forger|State|Doubled|DeviceKeys|Weak|Signed|Unsigned|Unreadable|Verif|Withdraw|Pin|Change|Conflict|Requirement|Verdict|Shields|Codes
TOO_SLOW := HistoryIsJudged|ForgeriesProve|Owner|EverybodyAtOnce|StormOf|WithoutTheGate|Killed|TakesOver|FailedCommit|FirstStarts|FailedRead|CannotBeFetched|StandBy|PostgreSQL|Example

.PHONY: mutation
mutation: ## break the code of trust in every small way, one at a time, and see the tests notice; FILES="steps.go" chooses (half an hour)
	@./e2e/setup.sh go >/dev/null
	$(GO) run ./internal/mutation -package ./cryptohook -files $(or $(FILES),$(MUTATED)) -known internal/mutation/known.txt -rows \
		-timeout 1m -run '$(MUTATION)' -then . -skip '$(TOO_SLOW)'

.PHONY: soak
soak: ## everything goes wrong for half an hour, and nothing may be lost or doubled; docs/reliability.md has the table
	@./e2e/setup.sh go synapse element postgres >/dev/null
	$(GO) test -tags $(TAGS) -count 1 -timeout 45m -v ./e2e/soak -full

# Cargo builds the reference; without it ours alone is measured.
.PHONY: bench
bench: ## how fast it is, against stock mautrix and Element's crypto, in docs/performance.md (half an hour); ONLY="keys-1" measures a part, ROUNDS=1 once
	@./e2e/setup.sh go postgres >/dev/null
	@if command -v cargo >/dev/null; then \
		cargo build --release --locked --manifest-path bench/reference/Cargo.toml --target-dir .cache/reference; \
	else echo "cargo is missing, so the reference cannot be built; rustup installs it."; fi
	@mkdir -p .cache/bench
	@$(GO) build -tags $(TAGS) -o .cache/bench/ ./bench ./bench/answers
	@.cache/bench/bench -rounds $(or $(ROUNDS),5) $(if $(ONLY),-only '$(ONLY)')
	@$(if $(ONLY),,test ! -e .cache/reference/release/reference || (cd bench/plots && $(GO) run . -profile ../../.cache/bench/hook-sqlite-full-receive_1.pprof))

.PHONY: bench-check
bench-check: ## fails if it has become slower, against stock mautrix in the same run, by more than a fifth since make bench (minutes)
	@./e2e/setup.sh go >/dev/null
	@mkdir -p .cache/bench
	@$(GO) build -tags $(TAGS) -o .cache/bench/ ./bench ./bench/answers
	@.cache/bench/bench -check -rounds $(or $(ROUNDS),5)

# Their versions are in internal/tools/go.mod, so that they are not among the program's own dependencies.
TOOL := $(GO) tool -modfile=internal/tools/go.mod

.PHONY: licences
licences: ## list the licences of what is in the program, in docs/licences.md
	@mkdir -p .cache
	@GOFLAGS=-tags=$(TAGS) $(TOOL) go-licenses report --template internal/tools/licences.tpl . >.cache/licences.md 2>.cache/licences.log || \
		{ cat .cache/licences.log; exit 1; }
	@mv .cache/licences.md docs/licences.md

.PHONY: vulncheck
vulncheck: ## look for known faults in what the program calls; needs Go's vulnerability database, from the network
	@mkdir -p .cache
	@timeout 300 $(TOOL) govulncheck -tags $(TAGS) ./... >.cache/vulncheck.log 2>&1; code=$$?; \
	if [ $$code = 124 ] || grep -q 'fetching vulnerabilities' .cache/vulncheck.log; then \
		echo "Nothing was checked: the vulnerability database cannot be reached from this machine."; exit 1; \
	fi; \
	cat .cache/vulncheck.log; exit $$code

.PHONY: fmt
fmt:
	gofmt -w .

.PHONY: clean
clean: ## what the commands above installed and built
	rm -rf .cache sendertrust

.PHONY: help
help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'
